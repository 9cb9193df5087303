//! Regular expressions that are tried on whole lines.

use std::fmt;

use regex::Regex;
use serde::Deserialize;

/// Largest compiled expression, in bytes.
const SIZE_LIMIT: usize = 1 << 20;

/// A regular expression for a line, without its end. A line that has not ended is not tried, so that
/// it doesn't matter in which pieces output comes.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct LinePattern(Regex);

impl TryFrom<String> for LinePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match regex::RegexBuilder::new(&text).size_limit(SIZE_LIMIT).build() {
            Ok(r) => Ok(Self(r)),
            Err(e) => {
                // The lines before show the expression, as our caller does.
                let text = e.to_string();
                let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
                Err(format!("this is no regular expression: {why}"))
            }
        }
    }
}

impl PartialEq for LinePattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl fmt::Display for LinePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line like /{}/", self.0.as_str())
    }
}

impl LinePattern {
    /// The first of `text`'s lines that it matches. The last one counts even if it has not ended.
    pub fn find<'a>(&self, text: &'a str) -> Option<&'a str> {
        text.split('\n').map(|l| l.trim_matches('\r')).find(|l| self.0.is_match(l))
    }

    /// The first ended line in `bytes` that it matches, and how many bytes end with it.
    pub fn find_ended(&self, bytes: &[u8]) -> Option<(String, usize)> {
        let mut end = 0;
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            let ended = line.strip_suffix(b"\n")?;
            end += line.len();
            let text = String::from_utf8_lossy(ended);
            let text = text.trim_matches('\r');
            if self.0.is_match(text) {
                return Some((text.to_owned(), end));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_matched() {
        let p = LinePattern::try_from("^n = [0-9]+$".to_owned()).unwrap();
        assert_eq!(p.find_ended(b"n = 1"), None);
        assert_eq!(p.find_ended(b"x\r\nn = 12\r\nn"), Some(("n = 12".into(), 11)));
        assert_eq!(p.find("x\r\nn = 12"), Some("n = 12"));
        assert_eq!(p.find("n = x"), None);
        assert_eq!(p.to_string(), "line like /^n = [0-9]+$/");
        assert!(LinePattern::try_from("(".to_owned()).unwrap_err().contains("no regular expression"));
        assert!(LinePattern::try_from("a{1000}{1000}{1000}".to_owned()).is_err());
    }
}
