//! A scenario's text and the places in it that messages name.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Where a scenario comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It is part of the program; this is its file's name.
    Shipped(String),
    /// A file.
    File(PathBuf),
}

impl Origin {
    /// What relative paths in it are relative to; `None` for the current directory.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Shipped(_) => None,
            Self::File(path) => path.parent(),
        }
    }

    /// The file's name without `.toml`.
    pub fn stem(&self) -> String {
        let path = match self {
            Self::Shipped(name) => Path::new(name),
            Self::File(path) => path,
        };
        path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shipped(name) => write!(f, "shipped {name}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What is wrong with a scenario, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub origin: Origin,
    /// Line and column, both counted from 1; the column in characters.
    pub place: Option<(usize, usize)>,
    /// What is wrong, and what to write instead.
    pub message: String,
    /// The line's text.
    line: String,
}

impl Problem {
    /// A problem with the file as a whole.
    pub fn whole(origin: &Origin, message: impl fmt::Display) -> Self {
        Self { origin: origin.clone(), place: None, message: message.to_string(), line: String::new() }
    }

    /// A problem at the bytes `span` of `text`.
    pub fn at(origin: &Origin, text: &str, span: Range<usize>, message: impl fmt::Display) -> Self {
        let start = (0..=span.start.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        let before = text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line = text.get(line_start..).unwrap_or_default().lines().next().unwrap_or_default();
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        Self {
            origin: origin.clone(),
            place: Some((before.matches('\n').count() + 1, column)),
            message: message.to_string(),
            line: line.to_owned(),
        }
    }
}

impl fmt::Display for Problem {
    /// `FILE:LINE:COLUMN: message`, then the line with a mark under the column.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.message.trim_end();
        let Some((line, column)) = self.place else {
            return write!(f, "{}: {message}", self.origin);
        };
        let number = line.to_string();
        writeln!(f, "{}:{line}:{column}: {message}", self.origin)?;
        writeln!(f, " {number} | {}", self.line)?;
        write!(f, " {:w$} | {:c$}^", "", "", w = number.len(), c = column.saturating_sub(1))
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_shown() {
        let origin = Origin::File("dir/x.toml".into());
        let p = Problem::at(&origin, "a = 1\nä = 2\n", 11..12, "no");
        assert_eq!(p.to_string(), "dir/x.toml:2:5: no\n 2 | ä = 2\n   |     ^");
        // Beyond the end, and inside a character.
        assert_eq!(Problem::at(&origin, "a", 9..9, "no").place, Some((1, 2)));
        assert_eq!(Problem::at(&origin, "ä", 1..1, "no").place, Some((1, 1)));
        assert_eq!(Problem::whole(&origin, "no").to_string(), "dir/x.toml: no");
        assert_eq!(origin.stem(), "x");
    }
}
