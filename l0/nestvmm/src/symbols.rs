//! Names of a guest's code addresses: from its ELF file, a `System.map`, or `/proc/kallsyms`.
//!
//! Not supported: symbols in separate debug files of a stripped kernel, and user programs.

use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSymbol, SymbolKind};

/// Beyond this distance from a symbol without a size, code belongs to something else.
const FAR: u64 = 1 << 20;

/// Why a file gives no symbols.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// It can't be read.
    #[error("{0}: can't be read: {1}")]
    Unreadable(PathBuf, std::io::Error),
    /// It has the magic number of ELF, and is none.
    #[error("{0}: {1}")]
    Elf(PathBuf, object::Error),
    /// A line of text that is not "ADDRESS TYPE NAME".
    #[error(
        "{0}: line {1} is not \"ADDRESS TYPE NAME\"; wanted are an ELF file, a System.map or /proc/kallsyms"
    )]
    Line(PathBuf, usize),
    /// Nothing in it names code.
    #[error(
        "{0}: no symbols of code in it; a stripped kernel has none, its System.map or /proc/kallsyms has"
    )]
    Empty(PathBuf),
    /// What the kernel shows to users without the right to see addresses.
    #[error("{0}: all addresses are zero; read /proc/kallsyms as root, with kernel.kptr_restrict at most 1")]
    Hidden(PathBuf),
}

#[derive(Debug, PartialEq, Eq)]
struct Symbol {
    address: u64,
    /// 0 if unknown.
    size: u64,
    name: String,
}

/// Symbols of a guest's code.
#[derive(Debug)]
pub struct Symbols {
    /// Sorted by address.
    symbols: Vec<Symbol>,
}

impl Symbols {
    /// Reads `path`; `offset` is added to each address, wrapping.
    ///
    /// # Errors
    /// [`SymbolError`] says what is wrong with the file.
    pub fn read(path: &Path, offset: u64) -> Result<Self, SymbolError> {
        let data = fs::read(path).map_err(|e| SymbolError::Unreadable(path.into(), e))?;
        let mut symbols = if data.starts_with(b"\x7fELF") { elf(path, &data)? } else { text(path, &data)? };
        if symbols.is_empty() {
            return Err(SymbolError::Empty(path.into()));
        }
        if symbols.iter().all(|s| s.address == 0) {
            return Err(SymbolError::Hidden(path.into()));
        }
        symbols.iter_mut().for_each(|s| s.address = s.address.wrapping_add(offset));
        symbols.sort_by_key(|s| s.address);
        Ok(Self { symbols })
    }

    /// The name of what `address` is in, and the distance from its start.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        let after = self.symbols.partition_point(|s| s.address <= address);
        let s = self.symbols.get(after.checked_sub(1)?)?;
        let distance = address - s.address;
        let within = if s.size == 0 { distance < FAR } else { distance < s.size };
        within.then_some((&*s.name, distance))
    }
}

fn elf(path: &Path, data: &[u8]) -> Result<Vec<Symbol>, SymbolError> {
    let file = object::File::parse(data).map_err(|e| SymbolError::Elf(path.into(), e))?;
    let named = file.symbols().filter(|s| {
        // Assembly often leaves its labels without a type.
        matches!(s.kind(), SymbolKind::Text | SymbolKind::Unknown | SymbolKind::Label) && s.is_definition()
    });
    Ok(named
        .filter_map(|s| {
            let name = s.name().ok().filter(|n| !n.is_empty())?;
            Some(Symbol { address: s.address(), size: s.size(), name: name.into() })
        })
        .collect())
}

/// `System.map` and `/proc/kallsyms`: address, type as nm(1) has it, name, and perhaps a module in brackets.
fn text(path: &Path, data: &[u8]) -> Result<Vec<Symbol>, SymbolError> {
    let text = String::from_utf8_lossy(data);
    let mut symbols = Vec::new();
    for (n, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let wrong = || SymbolError::Line(path.into(), n + 1);
        let mut words = line.split_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
            return Err(wrong());
        };
        let address = u64::from_str_radix(address, 16).map_err(|_| wrong())?;
        if kind.len() != 1 {
            return Err(wrong());
        }
        if matches!(kind, "t" | "T" | "w" | "W") {
            let module = words.next().map(|m| format!(" {m}")).unwrap_or_default();
            symbols.push(Symbol { address, size: 0, name: format!("{name}{module}") });
        }
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], offset: u64) -> Result<Symbols, SymbolError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Symbols::read(file.path(), offset)
    }

    #[test]
    fn kallsyms_name_code_by_the_symbol_before() {
        let s = read(
            b"ffffffff81000000 T _text\nffffffff81000040 D data\nffffffff81000100 t helper\n\
              ffffffffc0000000 t vmx_exit\t[kvm_intel]\n",
            0,
        )
        .unwrap();
        assert_eq!(s.find(0xffff_ffff_8100_0000), Some(("_text", 0)));
        assert_eq!(s.find(0xffff_ffff_8100_0050), Some(("_text", 0x50)), "data is no code");
        assert_eq!(s.find(0xffff_ffff_8100_0104), Some(("helper", 4)));
        assert_eq!(s.find(0xffff_ffff_c000_0010), Some(("vmx_exit [kvm_intel]", 0x10)));
        assert_eq!(s.find(0xffff_ffff_80ff_ffff), None);
        assert_eq!(s.find(0xffff_ffff_8120_0100), None, "too far from a symbol of unknown size");
    }

    #[test]
    fn an_offset_moves_all() {
        let s = read(b"1000 T start\n", 0xffff_ffff_0000_0000).unwrap();
        assert_eq!(s.find(0xffff_ffff_0000_1002), Some(("start", 2)));
        assert_eq!(s.find(0x1002), None);
    }

    /// The microvisor's own ELF file: its entry point has a name, and sizes bound what belongs to a symbol.
    #[test]
    fn elf_files_have_sizes() {
        let s = read(microvisor::BYTES, 0).unwrap();
        let sized = s.symbols.iter().find(|s| s.size > 4).unwrap();
        assert_eq!(s.find(sized.address + 1).map(|(_, d)| d), Some(1));
        let end = sized.address + sized.size;
        assert_ne!(s.find(end).map(|(n, _)| n), Some(&*sized.name));
    }

    #[test]
    fn what_is_no_symbol_file_is_told() {
        let error = |text: &[u8]| read(text, 0).unwrap_err().to_string();
        assert!(error(b"0000000000000000 T a\n0000000000000000 t b\n").contains("as root"));
        assert!(error(b"1000 D data\n").contains("no symbols of code"));
        assert!(error(b"").contains("no symbols of code"));
        assert!(error(b"1000 T a\nhello\n").contains("line 2"));
        assert!(error(b"xyz T a\n").contains("line 1"));
        assert!(!error(b"\x7fELF nothing").is_empty());
    }
}
