//! Kernel modules: which files they need and in which order, from their `.modinfo`
//! (`modules.dep` is made when a kernel is installed, so packages don't have it).
//!
//! Not supported: soft dependencies, which are not needed to load.

use std::collections::BTreeMap;
use std::path::Path;

use machine::boot::{Compression, decompress};
use object::{Object, ObjectSection};

use super::ImageError;

/// Largest module, unpacked, in bytes.
const MODULE_MAX: u64 = 64 << 20;
/// Deepest directory searched for modules.
const MAX_DEPTH: usize = 12;

/// A module, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// Path below `lib/modules/RELEASE`, without the compression's suffix.
    pub path: String,
    /// Contents.
    pub data: Vec<u8>,
    /// Names of the modules that it needs, itself.
    pub depends: Vec<String>,
}

/// A module's name: the base name without suffixes, with underscores.
pub(super) fn module_name(path: &str) -> Option<String> {
    let base = path.rsplit('/').next().unwrap_or(path);
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|s| base.strip_suffix(s))?;
    Some(stem.replace('-', "_"))
}

/// Where modules can be had from, by name.
pub(super) trait Source {
    /// Path and packed contents of module `name`; `None` when there is none.
    fn find(&self, name: &str) -> Result<Option<(String, Vec<u8>)>, ImageError>;
}

/// Modules taken out of packages.
#[derive(Debug, Default)]
pub(super) struct PackedModules(pub BTreeMap<String, (String, Vec<u8>)>);

impl PackedModules {
    /// Adds the module at `path`, which may start with `lib/modules/RELEASE`.
    pub(super) fn add(&mut self, path: &str, data: Vec<u8>) {
        if let Some(name) = module_name(path) {
            self.0.insert(name, (below_release(path).to_owned(), data));
        }
    }
}

/// The part of a path after `lib/modules/RELEASE/`.
fn below_release(path: &str) -> &str {
    path.split_once("lib/modules/").and_then(|(_, p)| p.split_once('/')).map_or(path, |(_, p)| p)
}

impl Source for PackedModules {
    fn find(&self, name: &str) -> Result<Option<(String, Vec<u8>)>, ImageError> {
        Ok(self.0.get(name).cloned())
    }
}

/// Modules in a directory such as `/lib/modules/RELEASE`.
#[derive(Debug)]
pub(super) struct ModulesDir(BTreeMap<String, std::path::PathBuf>, std::path::PathBuf);

impl ModulesDir {
    /// Finds all modules below `dir`; symbolic links are not followed.
    pub(super) fn scan(dir: &Path) -> Result<Self, ImageError> {
        let mut found = BTreeMap::new();
        scan(dir, 0, &mut found)?;
        Ok(Self(found, dir.to_owned()))
    }
}

fn scan(
    dir: &Path,
    depth: usize,
    found: &mut BTreeMap<String, std::path::PathBuf>,
) -> Result<(), ImageError> {
    let wrap = |source| ImageError::Read { path: dir.to_owned(), source };
    for entry in std::fs::read_dir(dir).map_err(wrap)? {
        let entry = entry.map_err(wrap)?;
        let kind = entry.file_type().map_err(wrap)?;
        let path = entry.path();
        if kind.is_dir() && depth < MAX_DEPTH {
            scan(&path, depth + 1, found)?;
        } else if kind.is_file()
            && let Some(name) = module_name(&path.to_string_lossy())
        {
            found.insert(name, path);
        }
    }
    Ok(())
}

impl Source for ModulesDir {
    fn find(&self, name: &str) -> Result<Option<(String, Vec<u8>)>, ImageError> {
        let Some(path) = self.0.get(name) else { return Ok(None) };
        let data = std::fs::read(path).map_err(|source| ImageError::Read { path: path.clone(), source })?;
        let inside = path.strip_prefix(&self.1).unwrap_or(path);
        Ok(Some((inside.to_string_lossy().into_owned(), data)))
    }
}

/// Unpacks the module at `path` and reads what it needs.
fn load(path: &str, packed: Vec<u8>) -> Result<Module, ImageError> {
    let bad = |reason: String| ImageError::BadModule { module: path.into(), reason };
    let stem = path.find(".ko").and_then(|at| path.get(..at + 3)).unwrap_or(path);
    let data = match Compression::detect(&packed) {
        Some(format) => decompress(format, &packed, MODULE_MAX).map_err(|e| bad(e.to_string()))?,
        None => packed,
    };
    let elf = object::File::parse(&*data).map_err(|e| bad(format!("not an ELF file: {e}")))?;
    let section = elf.section_by_name(".modinfo").ok_or_else(|| bad("it has no .modinfo section".into()))?;
    let info = section.data().map_err(|e| bad(e.to_string()))?;
    let depends = info
        .split(|b| *b == 0)
        .filter_map(|field| std::str::from_utf8(field).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect();
    Ok(Module { path: stem.into(), data, depends })
}

/// What [`resolve`] found.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    /// The modules by name.
    pub modules: BTreeMap<String, Module>,
    /// Wanted or needed names that no file has: built into the kernel, or missing.
    pub missing: Vec<String>,
}

/// Takes `wanted` and all that they need from `source`.
pub(super) fn resolve(source: &dyn Source, wanted: &[&str]) -> Result<Resolved, ImageError> {
    let mut resolved = Resolved::default();
    let mut todo: Vec<String> = wanted.iter().map(|n| n.replace('-', "_")).collect();
    while let Some(name) = todo.pop() {
        if resolved.modules.contains_key(&name) || resolved.missing.contains(&name) {
            continue;
        }
        match source.find(&name)? {
            Some((path, packed)) => {
                let module = load(&path, packed)?;
                todo.extend(module.depends.iter().cloned());
                resolved.modules.insert(name, module);
            }
            None => resolved.missing.push(name),
        }
    }
    Ok(resolved)
}

impl Resolved {
    /// The text of `modules.dep`: each module with all it needs, directly or not. A module
    /// comes before those it needs itself, as modprobe loads from the end.
    pub(super) fn modules_dep(&self) -> String {
        let mut text = String::new();
        for (name, module) in &self.modules {
            let mut order = Vec::new();
            self.post_order(name, &mut Vec::new(), &mut order);
            // The last is the module itself.
            let needed = order.iter().rev().skip(1).filter_map(|n| self.modules.get(*n));
            let paths: String = needed.map(|m| format!(" {}", m.path)).collect();
            text += &format!("{}:{paths}\n", module.path);
        }
        text
    }

    /// Appends `name` after all it needs. Damaged modules that need each other in a circle
    /// are each visited once.
    fn post_order<'s>(&'s self, name: &str, seen: &mut Vec<&'s str>, order: &mut Vec<&'s str>) {
        let Some((name, module)) = self.modules.get_key_value(name) else { return };
        if seen.contains(&name.as_str()) {
            return;
        }
        seen.push(name);
        for d in &module.depends {
            self.post_order(d, seen, order);
        }
        order.push(name);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A little ELF object with a `.modinfo` that says `depends`.
    pub(in crate::image) fn fake_module(depends: &str) -> Vec<u8> {
        let modinfo = format!("license=GPL\0depends={depends}\0");
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let (info_at, names_at) = (64_u64, 64 + modinfo.len() as u64);
        let table_at = names_at + names.len() as u64;
        for half in [1_u16, 62] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(1_u32.to_le_bytes());
        for word in [0, 0, table_at] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(0_u32.to_le_bytes());
        for half in [64_u16, 0, 0, 64, 3, 2] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(modinfo.as_bytes());
        elf.extend(names);
        let mut section = |name: u32, kind: u32, at: u64, len: u64| {
            elf.extend(name.to_le_bytes());
            elf.extend(kind.to_le_bytes());
            for word in [0, 0, at, len, 0, 1, 0] {
                elf.extend(word.to_le_bytes());
            }
        };
        section(0, 0, 0, 0);
        section(1, 1, info_at, modinfo.len() as u64);
        section(10, 3, names_at, names.len() as u64);
        elf
    }

    fn source(modules: &[(&str, &str)]) -> PackedModules {
        let mut packed = PackedModules::default();
        for (path, depends) in modules {
            packed.add(path, fake_module(depends));
        }
        packed
    }

    #[test]
    fn modules_come_with_what_they_need() {
        let source = source(&[
            ("usr/lib/modules/6.1/kernel/kvm/kvm-intel.ko", "kvm"),
            ("lib/modules/6.1/kernel/kvm/kvm.ko.xz", "irqbypass,builtin-one"),
            ("lib/modules/6.1/kernel/lib/irqbypass.ko", ""),
            ("lib/modules/6.1/kernel/other.ko", ""),
        ]);
        let r = resolve(&source, &["kvm-intel"]).unwrap();
        assert_eq!(r.modules.keys().collect::<Vec<_>>(), ["irqbypass", "kvm", "kvm_intel"]);
        assert_eq!(r.missing, ["builtin_one"]);
        assert_eq!(
            r.modules_dep(),
            "kernel/lib/irqbypass.ko:\nkernel/kvm/kvm.ko: kernel/lib/irqbypass.ko\n\
             kernel/kvm/kvm-intel.ko: kernel/kvm/kvm.ko kernel/lib/irqbypass.ko\n"
        );
    }

    #[test]
    fn circles_and_diamonds_end() {
        let r = resolve(&source(&[("a.ko", "b,c"), ("b.ko", "d"), ("c.ko", "d"), ("d.ko", "a")]), &["a"])
            .unwrap();
        let dep = r.modules_dep();
        let a = dep.lines().find(|l| l.starts_with("a.ko:")).unwrap();
        assert_eq!(a, "a.ko: c.ko b.ko d.ko");
    }

    #[test]
    fn files_that_are_no_modules_are_refused() {
        let mut packed = PackedModules::default();
        packed.add("x.ko", b"text".to_vec());
        assert!(matches!(resolve(&packed, &["x"]), Err(ImageError::BadModule { .. })));
        assert_eq!(module_name("a/b/kvm-amd.ko.zst").as_deref(), Some("kvm_amd"));
        assert_eq!(module_name("a/b/kvm-amd.c"), None);
    }
}
