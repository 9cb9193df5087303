//! Lengths of time as scenarios write them: `90s`, `3m`, `500ms`.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

/// Longest that can be written: a day.
const MAX: Duration = Duration::from_secs(24 * 3600);

/// How long something may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TimeLimit(pub Duration);

impl FromStr for TimeLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no length of time; write for example \"500ms\", \"90s\" or \"3m\"");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let ms = match unit {
            "ms" => Some(number),
            "s" => number.checked_mul(1000),
            "m" => number.checked_mul(60_000),
            "h" => number.checked_mul(3_600_000),
            _ => return Err(wrong()),
        };
        match ms.map(Duration::from_millis) {
            Some(d) if d <= MAX => Ok(Self(d)),
            _ => Err(format!("{text:?} is longer than a day")),
        }
    }
}

impl TryFrom<String> for TimeLimit {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        let ms = |t: &str| t.parse::<TimeLimit>().map(|d| d.0.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("90s"), Ok(90_000));
        assert_eq!(ms("3m"), Ok(180_000));
        assert_eq!(ms("24h"), Ok(86_400_000));
        for bad in
            ["", "90", "s", "-1s", "1.5s", "1 s", "25h", "99999999999999999999s", "18446744073709551615m"]
        {
            assert!(ms(bad).is_err(), "{bad}");
        }
    }
}
