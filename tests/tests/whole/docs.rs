//! The documentation says what the program does.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::process::Launch;

const LIMIT: Duration = Duration::from_secs(30);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Options and their possible values in a help text, as the user guide writes them.
fn options(help: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut last = String::new();
    for line in help.lines() {
        let line = line.trim_start();
        if let Some(at) = line.find("--").filter(|at| *at == 0 || line.starts_with('-')) {
            let name = line.get(at..).unwrap_or_default();
            let end = name
                .find(|c: char| c != '-' && !c.is_ascii_lowercase() && !c.is_ascii_digit())
                .unwrap_or(name.len());
            last = name.get(..end).unwrap_or_default().to_owned();
            found.insert(last.clone());
        } else if let Some((value, _)) = line.strip_prefix("- ").and_then(|l| l.split_once(':')) {
            found.insert(format!("{last} {value}"));
        }
    }
    found
}

#[test]
fn the_user_guide_has_every_option() {
    let guide = fs::read_to_string(root().join("docs/user-guide.md")).expect("the user guide is there");
    let commands: [&[&str]; 18] = [
        &[],
        &["run"],
        &["demo"],
        &["doctor"],
        &["image", "build"],
        &["image", "inspect"],
        &["bench", "boot"],
        &["bench", "nested"],
        &["bench", "vmexit"],
        &["bench", "exits"],
        &["bench", "engines"],
        &["bench", "mix"],
        &["scenario", "run"],
        &["scenario", "list"],
        &["scenario", "check"],
        &["trace", "summary"],
        &["trace", "show"],
        &["trace", "export"],
    ];
    for command in commands {
        let finished = Launch::new(command.iter().copied()).arg("--help").run(LIMIT);
        finished.expect_status(0);
        let options = options(&finished.output);
        assert!(options.contains("--help"), "{options:?}");
        for option in &options {
            // "auto" is explained in the line of the value that it stands for.
            let documented = guide.contains(&format!("`{option}")) || option.ends_with(" auto");
            assert!(documented, "docs/user-guide.md lacks {option} of `nestvmm {}`", command.join(" "));
        }
    }
}

#[test]
fn the_user_guide_has_every_exit_status() {
    let guide = fs::read_to_string(root().join("docs/user-guide.md")).expect("the user guide is there");
    for command in [&["run", "--help"][..], &["scenario", "run", "--help"]] {
        let finished = Launch::new(command.iter().copied()).run(LIMIT);
        let (_, statuses) = finished.output.split_once("Exit status").expect("the help names statuses");
        for line in statuses.lines().skip(1) {
            let Some((status, _)) = line.trim().split_once("  ") else { continue };
            let status = status.replace("128+N", "128 + N");
            assert!(guide.contains(&format!("| {status} |")), "docs/user-guide.md lacks status {status}");
        }
    }
}

/// Files that are named in a page's links, relative to it.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    targets.filter(|t| !t.is_empty() && !t.contains(':')).collect()
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut pages = vec![root().join("README.md")];
    let docs = fs::read_dir(root().join("docs")).expect("there is a docs folder");
    pages.extend(
        docs.map(|e| e.expect("it can be read").path()).filter(|p| p.extension().is_some_and(|e| e == "md")),
    );
    assert!(pages.len() >= 5, "{pages:?}");
    for page in pages {
        let text = fs::read_to_string(&page).expect("pages are text");
        let folder = page.parent().expect("it is in a folder");
        for link in links(&text) {
            assert!(folder.join(link).exists(), "{}: no {link}", page.display());
        }
        // Source files are named as `path/file.rs`, from the root.
        for name in text
            .split('`')
            .filter(|n| n.ends_with(".rs") && n.contains('/') && !n.contains(char::is_whitespace))
        {
            assert!(root().join(name).exists(), "{}: no {name}", page.display());
        }
    }
}
