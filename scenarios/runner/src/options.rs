//! The options of `nestvmm run` that a scenario's `[run]` table may set. The program hands their list in,
//! so that a new option can be used in scenarios as soon as it exists.

use std::path::Path;

use toml::Value;

/// An option of `nestvmm run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionSpec {
    /// Its name without the dashes. The image, which has no name on the command line, is `image`.
    pub name: String,
    /// Whether it has a value; otherwise it is a switch.
    pub takes_value: bool,
    /// Whether it may be repeated.
    pub repeats: bool,
    /// Whether the value is a file's path.
    pub is_path: bool,
    /// The values that it may have; empty for any.
    pub values: Vec<String>,
}

/// The name that stands for the argument without a name.
pub const IMAGE: &str = "image";

/// Options that the runner needs for itself, and why.
const RESERVED: [(&str, &str); 3] = [
    ("console", "the runner is at the other end of the console"),
    ("exit-stats-json", "the runner reads the statistics; write [[checks]]"),
    ("help", "it is no option of a run"),
];

/// The arguments of `nestvmm run` that set `name` to `value`; relative paths are taken from `folder`.
///
/// # Errors
/// What is wrong with it, and what to write instead.
pub fn arguments(
    specs: &[OptionSpec],
    name: &str,
    value: &Value,
    folder: Option<&Path>,
) -> Result<Vec<String>, String> {
    if let Some((_, why)) = RESERVED.iter().find(|(n, _)| *n == name) {
        return Err(format!("{name} can't be set in a scenario: {why}"));
    }
    let spec = specs.iter().find(|s| s.name == name).ok_or_else(|| unknown(specs, name))?;
    let mut arguments = Vec::new();
    match value {
        Value::Boolean(on) if !spec.takes_value => {
            if *on {
                arguments.push(format!("--{name}"));
            }
        }
        _ if !spec.takes_value => return Err(format!("{name} is a switch: write true or false")),
        Value::Array(values) if spec.repeats => {
            for v in values {
                add(&mut arguments, spec, v, folder)?;
            }
        }
        Value::Array(_) => return Err(format!("{name} can be given only once: write one value")),
        v => add(&mut arguments, spec, v, folder)?,
    }
    Ok(arguments)
}

fn add(
    arguments: &mut Vec<String>,
    spec: &OptionSpec,
    value: &Value,
    folder: Option<&Path>,
) -> Result<(), String> {
    let name = &spec.name;
    let text = match value {
        Value::String(s) => s.clone(),
        Value::Integer(n) => n.to_string(),
        _ => return Err(format!("{name} needs a text or a whole number")),
    };
    if !spec.values.is_empty() && !spec.values.contains(&text) {
        return Err(format!("{name} can't be {text:?}; write one of {}", spec.values.join(", ")));
    }
    let text = match folder {
        Some(folder) if spec.is_path => folder.join(text).to_string_lossy().into_owned(),
        _ => text,
    };
    if name == IMAGE {
        arguments.push(text);
    } else {
        // One argument, so that a value may start with a dash.
        arguments.push(format!("--{name}={text}"));
    }
    Ok(())
}

fn unknown(specs: &[OptionSpec], name: &str) -> String {
    if name.contains('_') && specs.iter().any(|s| s.name == name.replace('_', "-")) {
        return format!("unknown option {name}; write {}", name.replace('_', "-"));
    }
    let reserved = |s: &&OptionSpec| !RESERVED.iter().any(|(n, _)| *n == s.name);
    let names: Vec<&str> = specs.iter().filter(reserved).map(|s| s.name.as_str()).collect();
    format!("unknown option {name}; `nestvmm run` has {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn specs() -> Vec<OptionSpec> {
        let spec = |name: &str, takes_value, repeats, is_path, values: &[&str]| OptionSpec {
            name: name.into(),
            takes_value,
            repeats,
            is_path,
            values: values.iter().map(|v| (*v).to_owned()).collect(),
        };
        vec![
            spec("image", true, false, true, &[]),
            spec("vmcs-access", true, false, false, &["trapped", "shadow"]),
            spec("module", true, true, false, &[]),
            spec("memory", true, false, false, &[]),
            spec("debug-exit", false, false, false, &[]),
            spec("console", true, false, false, &[]),
        ]
    }

    #[test]
    fn values_become_arguments() {
        let args = |name: &str, value: Value| arguments(&specs(), name, &value, Some(Path::new("dir")));
        assert_eq!(args("image", "a.img".into()), Ok(vec!["dir/a.img".into()]));
        assert_eq!(args("image", "/a.img".into()), Ok(vec!["/a.img".into()]));
        assert_eq!(args("memory", 512.into()), Ok(vec!["--memory=512".into()]));
        assert_eq!(args("debug-exit", true.into()), Ok(vec!["--debug-exit".into()]));
        assert_eq!(args("debug-exit", false.into()), Ok(vec![]));
        let modules = Value::Array(vec!["a b".into(), "c".into()]);
        assert_eq!(args("module", modules), Ok(vec!["--module=a b".into(), "--module=c".into()]));
    }

    #[test]
    fn mistakes_come_with_a_remedy() {
        let error = |name: &str, value: Value| arguments(&specs(), name, &value, None).unwrap_err();
        assert!(error("vmcs-access", "direct".into()).ends_with("write one of trapped, shadow"));
        assert!(error("vmcs_access", "shadow".into()).ends_with("write vmcs-access"));
        assert!(error("console", "none".into()).contains("other end"));
        assert!(error("memroy", 1.into()).contains("memory"));
        assert!(!error("memroy", 1.into()).contains("console"));
        assert!(error("debug-exit", "on".into()).contains("true or false"));
        assert!(error("memory", true.into()).contains("a text or a whole number"));
        assert!(error("memory", Value::Array(vec![])).contains("only once"));
    }
}
