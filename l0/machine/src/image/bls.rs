//! The UAPI Group's Boot Loader Specification: entry files, their order, and
//! systemd-boot's `loader.conf` as far as it chooses the default.
//!
//! Not supported: devicetree and its overlays, `@saved` defaults, counting boots (entries
//! that used up their tries sort last, but nothing is counted).

use std::cmp::Ordering;

/// Longest entry file taken, in bytes.
pub(super) const ENTRY_MAX: u64 = 64 << 10;

/// One boot entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootEntryConf {
    /// File name without `.conf` or `.efi` and without boot counters.
    pub id: String,
    /// The file's whole name.
    pub file_name: String,
    /// `title`.
    pub title: Option<String>,
    /// `version`.
    pub version: Option<String>,
    /// `sort-key`.
    pub sort_key: Option<String>,
    /// `machine-id`.
    pub machine_id: Option<String>,
    /// `linux`: path of the kernel on the partition.
    pub linux: Option<String>,
    /// `efi`: path of an EFI program, which may be a unified kernel image.
    pub efi: Option<String>,
    /// `initrd`, in order.
    pub initrds: Vec<String>,
    /// `options`, joined by spaces.
    pub options: Option<String>,
    /// `architecture`.
    pub architecture: Option<String>,
    /// Tries left, from the file's name.
    pub tries_left: Option<u32>,
}

impl BootEntryConf {
    /// An entry called `file_name` with nothing in it.
    pub fn named(file_name: &str) -> Self {
        let stem = [".conf", ".efi"].iter().find_map(|s| strip_suffix_ignore_case(file_name, s));
        let (id, tries_left) = split_counter(stem.unwrap_or(file_name));
        Self { id: id.into(), file_name: file_name.into(), tries_left, ..Self::default() }
    }

    /// Reads an entry file. Unknown keys are skipped, as the specification demands.
    pub fn parse(file_name: &str, text: &str) -> Self {
        let mut entry = Self::named(file_name);
        for (key, value) in key_values(text) {
            let once = |slot: &mut Option<String>| *slot = Some(value.to_owned());
            match key {
                "title" => once(&mut entry.title),
                "version" => once(&mut entry.version),
                "sort-key" => once(&mut entry.sort_key),
                "machine-id" => once(&mut entry.machine_id),
                "linux" => once(&mut entry.linux),
                "efi" | "uki" => once(&mut entry.efi),
                "architecture" => once(&mut entry.architecture),
                "initrd" => entry.initrds.push(value.to_owned()),
                "options" => match &mut entry.options {
                    Some(o) => {
                        o.push(' ');
                        o.push_str(value);
                    }
                    none => *none = Some(value.to_owned()),
                },
                _ => {}
            }
        }
        entry
    }

    /// Whether this machine can start it: the architecture is absent or x64.
    pub fn is_for_this_machine(&self) -> bool {
        self.architecture.as_deref().is_none_or(|a| a.eq_ignore_ascii_case("x64"))
    }

    /// What to call it in front of a user.
    pub fn display_name(&self) -> &str {
        self.title.as_deref().unwrap_or(&self.id)
    }

    fn exhausted(&self) -> bool {
        self.tries_left == Some(0)
    }
}

fn strip_suffix_ignore_case<'a>(name: &'a str, suffix: &str) -> Option<&'a str> {
    let at = name.len().checked_sub(suffix.len())?;
    let (stem, end) = name.split_at_checked(at)?;
    end.eq_ignore_ascii_case(suffix).then_some(stem)
}

/// Splits `id+LEFT-DONE` or `id+LEFT`.
fn split_counter(stem: &str) -> (&str, Option<u32>) {
    let Some((id, counter)) = stem.rsplit_once('+') else { return (stem, None) };
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    match (left.parse(), done.parse::<u32>()) {
        (Ok(left), Ok(_)) => (id, Some(left)),
        _ => (stem, None),
    }
}

/// The `key value` lines of a configuration file, without comments.
fn key_values(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let (key, value) = line.split_once(|c: char| c.is_ascii_whitespace())?;
        (!line.starts_with('#')).then(|| (key, value.trim()))
    })
}

/// The `default` pattern of a `loader.conf`.
pub fn default_pattern(loader_conf: &str) -> Option<String> {
    key_values(loader_conf).filter(|(k, _)| *k == "default").last().map(|(_, v)| v.to_owned())
}

/// The order of entries in a menu, the preferred one first (section "Sorting").
pub(super) fn order(a: &BootEntryConf, b: &BootEntryConf) -> Ordering {
    let newest_first = |a: &Option<String>, b: &Option<String>| {
        compare_versions(b.as_deref().unwrap_or(""), a.as_deref().unwrap_or(""))
    };
    let by_key = match (&a.sort_key, &b.sort_key) {
        (Some(x), Some(y)) => x
            .cmp(y)
            .then_with(|| a.machine_id.cmp(&b.machine_id))
            .then_with(|| newest_first(&a.version, &b.version)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    };
    a.exhausted()
        .cmp(&b.exhausted())
        .then(by_key)
        .then_with(|| compare_versions(&b.id, &a.id))
        .then_with(|| b.tries_left.cmp(&a.tries_left))
}

/// The entry to start: the first that matches `pattern`, else the first of all. `entries`
/// are sorted.
pub fn choose<'e>(entries: &'e [BootEntryConf], pattern: Option<&str>) -> Option<&'e BootEntryConf> {
    let usable = || entries.iter().filter(|e| e.is_for_this_machine());
    pattern.and_then(|p| usable().find(|e| matches(e, p))).or_else(|| usable().next())
}

/// Whether `pattern` names `entry`, by its id or its file name.
pub(super) fn matches(entry: &BootEntryConf, pattern: &str) -> bool {
    let glob = |name: &str| glob(pattern.as_bytes(), name.as_bytes());
    let suffix = if strip_suffix_ignore_case(&entry.file_name, ".efi").is_some() { ".efi" } else { ".conf" };
    glob(&entry.id) || glob(&entry.file_name) || glob(&format!("{}{suffix}", entry.id))
}

/// Shell patterns with `*` and `?`, ignoring case. Linear in the product of both lengths.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(c) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(b) if *b == b'?' || b.eq_ignore_ascii_case(c) => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    p = after;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).is_some_and(|rest| rest.iter().all(|b| *b == b'*'))
}

/// Compares versions by the UAPI Group's Version Format Specification.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let valid = |c: &u8| c.is_ascii_alphanumeric() || b"-.~^".contains(c);
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip_while(a, |c| !valid(c));
        b = skip_while(b, |c| !valid(c));
        // '~' sorts before even the end of the other string.
        match (a.first() == Some(&b'~'), b.first() == Some(&b'~')) {
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (true, true) => {
                a = rest(a);
                b = rest(b);
                continue;
            }
            (false, false) => {}
        }
        match (a.is_empty(), b.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        // Then '-', '^' and '.', each lower than anything but those before it.
        let separator = b"-^.".iter().find(|s| a.first() == Some(s) || b.first() == Some(s));
        if let Some(s) = separator {
            match (a.first() == Some(s), b.first() == Some(s)) {
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                _ => {
                    a = rest(a);
                    b = rest(b);
                    continue;
                }
            }
        }
        let digits = a.first().is_some_and(u8::is_ascii_digit) || b.first().is_some_and(u8::is_ascii_digit);
        let class = if digits { u8::is_ascii_digit } else { u8::is_ascii_alphabetic };
        let (x, y) = (prefix(a, class), prefix(b, class));
        let by_part = if digits { compare_numbers(x, y) } else { x.cmp(y) };
        if by_part != Ordering::Equal {
            return by_part;
        }
        a = a.get(x.len()..).unwrap_or_default();
        b = b.get(y.len()..).unwrap_or_default();
    }
}

fn rest(s: &[u8]) -> &[u8] {
    s.get(1..).unwrap_or_default()
}

fn skip_while(s: &[u8], f: impl Fn(&u8) -> bool) -> &[u8] {
    s.get(s.iter().take_while(|c| f(c)).count()..).unwrap_or_default()
}

fn prefix(s: &[u8], f: fn(&u8) -> bool) -> &[u8] {
    s.get(..s.iter().take_while(|c| f(c)).count()).unwrap_or_default()
}

/// Compares digit strings of any length by value.
fn compare_numbers(a: &[u8], b: &[u8]) -> Ordering {
    let (a, b) = (skip_while(a, |c| *c == b'0'), skip_while(b, |c| *c == b'0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_the_specification_lists_them() {
        // The list in the Version Format Specification, section "Examples".
        let ascending = [
            "122.1",
            "123~rc1-1",
            "123",
            "123-a",
            "123-a.1",
            "123-1",
            "123-1.1",
            "123^post1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124-1",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(compare_versions(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare_versions(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare_versions("6.1.0-56", "6.1.0-9"), Ordering::Greater);
        assert_eq!(compare_versions("1.02", "1.2"), Ordering::Equal);
        assert_eq!(compare_versions("a_1", "a1"), Ordering::Equal);
    }

    #[test]
    fn an_entry_file() {
        let text = "# comment\ntitle   Debian GNU/Linux 12\nversion 6.1\n\nlinux /k/linux\ninitrd /k/a\ninitrd /k/b\n\
                    options root=/dev/vda2\noptions quiet\nfuture-key x\nsort-key debian\n";
        let e = BootEntryConf::parse("deb+3-1.conf", text);
        assert_eq!(e.id, "deb");
        assert_eq!(e.tries_left, Some(3));
        assert_eq!(e.title.as_deref(), Some("Debian GNU/Linux 12"));
        assert_eq!(e.linux.as_deref(), Some("/k/linux"));
        assert_eq!(e.initrds, ["/k/a", "/k/b"]);
        assert_eq!(e.options.as_deref(), Some("root=/dev/vda2 quiet"));
        assert_eq!(e.sort_key.as_deref(), Some("debian"));
    }

    fn entry(file_name: &str, text: &str) -> BootEntryConf {
        BootEntryConf::parse(file_name, text)
    }

    #[test]
    fn order_and_choice() {
        let mut all = [
            entry("old.conf", "sort-key a\nversion 6.1.0-9\nlinux /l"),
            entry("plain-2.conf", "linux /l"),
            entry("new.conf", "sort-key a\nversion 6.1.0-56\nlinux /l"),
            entry("bad+0-3.conf", "sort-key a\nversion 9\nlinux /l"),
            entry("plain-10.conf", "linux /l"),
            entry("arm.conf", "sort-key 0\narchitecture aa64\nlinux /l"),
        ];
        all.sort_by(order);
        let ids: Vec<_> = all.iter().map(|e| e.id.as_str()).collect();
        assert_eq!(ids, ["arm", "new", "old", "plain-10", "plain-2", "bad"]);
        let chosen = |p| choose(&all, p).map(|e| e.id.as_str());
        assert_eq!(chosen(None), Some("new"));
        assert_eq!(chosen(Some("plain-*")), Some("plain-10"));
        assert_eq!(chosen(Some("OLD.conf")), Some("old"));
        assert_eq!(chosen(Some("bad.conf")), Some("bad"));
        assert_eq!(chosen(Some("arm")), Some("new"), "an entry for another architecture is never chosen");
        assert_eq!(chosen(Some("nothing")), Some("new"));
    }

    #[test]
    fn the_last_default_counts() {
        assert_eq!(default_pattern("timeout 3\ndefault a\n#default c\ndefault b*\n").as_deref(), Some("b*"));
        assert_eq!(default_pattern(""), None);
    }

    #[test]
    fn globs() {
        for (pattern, name, yes) in [
            ("", "", true),
            ("*", "", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("?", "é", false),
            ("a?c", "abc", true),
            ("a", "ab", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), name.as_bytes()), yes, "{pattern} {name}");
        }
    }
}
