//! Finding the `nestvmm` program that this test run has built.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// Path of the program, built in the same profile as the tests.
///
/// `cargo test --workspace` builds it before any test runs. When only this package is tested, it
/// may be missing or old; then cargo is asked for it, once. `NESTVMM` names another one to test.
pub fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os("NESTVMM") {
        Some(p) => PathBuf::from(p),
        None => {
            let program = profile_dir().join("nestvmm");
            if !is_fresh(&program) {
                build();
            }
            assert!(program.exists(), "{} is not there after a build", program.display());
            program
        }
    })
}

/// `target/PROFILE` or `target/TRIPLE/PROFILE`: two folders above this test's program.
pub fn profile_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let test = std::env::current_exe().expect("a test knows its own path");
        let dir = test.ancestors().nth(2).expect("cargo puts tests into target/PROFILE/deps");
        dir.to_owned()
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|m| m.modified()).ok()
}

/// Whether `program` is newer than every source file that cargo notes beside it as its input.
fn is_fresh(program: &Path) -> bool {
    let Ok(inputs) = std::fs::read_to_string(program.with_extension("d")) else { return false };
    let Some(built) = modified(program) else { return false };
    let Some((_, inputs)) = inputs.split_once(':') else { return false };
    // Blanks in paths are escaped; such a path is not found, and the program counts as old.
    inputs.split_whitespace().all(|i| modified(Path::new(i)).is_some_and(|t| t <= built))
}

fn build() {
    let dir = profile_dir();
    let profile = match dir.file_name().and_then(|n| n.to_str()) {
        Some("debug") | None => "dev",
        Some(p) => p,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "nestvmm", "--profile", profile]);
    let parent = dir.parent().expect("the profile's folder is in target");
    // A target's folder is named by its triple.
    let triple = parent.file_name().and_then(|n| n.to_str()).filter(|n| n.matches('-').count() >= 2);
    match triple {
        Some(t) if parent.parent().is_some_and(|p| p.join("CACHEDIR.TAG").exists()) => {
            cargo.args(["--target", t]).arg("--target-dir").arg(parent.parent().unwrap_or(parent));
        }
        _ => {
            cargo.arg("--target-dir").arg(parent);
        }
    }
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    let status = cargo.status().expect("cargo starts");
    assert!(status.success(), "cargo can't build nestvmm: {status}");
}
