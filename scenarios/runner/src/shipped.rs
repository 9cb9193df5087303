//! The scenarios that are part of the program.

macro_rules! shipped {
    ($($name:literal),* $(,)?) => {
        /// File name and text of each, in the order in which they run.
        pub const SHIPPED: &[(&str, &str)] =
            &[$((concat!($name, ".toml"), include_str!(concat!("../../", $name, ".toml")))),*];
    };
}

shipped! {
    "microvisor",
    "l1-boot",
    "l1-crash",
    "l2-exits",
    "l2-panic-of-l1",
    "l2-module-reload",
    "l2-boot",
    "l2-memory-pressure",
    "l2-two-at-once",
    "l2-ten-boots",
    "depth-3",
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_scenario_of_the_folder_is_shipped() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name());
        let files: BTreeSet<String> =
            names.filter_map(|n| n.into_string().ok()).filter(|n| n.ends_with(".toml")).collect();
        let shipped: BTreeSet<String> = SHIPPED.iter().map(|(n, _)| (*n).to_owned()).collect();
        assert_eq!(files, shipped);
        assert_eq!(SHIPPED.len(), shipped.len());
    }
}
