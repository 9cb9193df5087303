//! The guests that scenarios name: what nestvmm brings or builds, and what `--guest` gives.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::cli::GuestFile;
use crate::image::{self, BuildOptions};
use crate::status::Failure;

/// The demonstration image that `nestvmm image build` makes.
const DEMO: &str = "demo";
/// The bare-metal hypervisor that tests VMX.
const MICROVISOR: &str = "microvisor";

/// Guests by name.
#[derive(Debug)]
pub struct Guests {
    given: BTreeMap<String, PathBuf>,
}

/// Guests that can be booted.
#[derive(Debug)]
pub struct Prepared {
    /// The arguments of `nestvmm run` for each.
    pub arguments: BTreeMap<String, Vec<String>>,
    /// Lives as long as it may be booted.
    _microvisor: Option<NamedTempFile>,
}

impl Guests {
    /// What there is without the user's help, and the user's, which come first.
    pub fn new(given: &[GuestFile]) -> Self {
        Self { given: given.iter().map(|g| (g.name.clone(), g.image.clone())).collect() }
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![DEMO.to_owned(), MICROVISOR.to_owned()];
        names.extend(self.given.keys().filter(|n| !matches!(n.as_str(), DEMO | MICROVISOR)).cloned());
        names
    }

    /// Makes those that are `used`.
    ///
    /// # Errors
    /// When one can't be built or written.
    pub fn prepare<'a>(&self, used: impl Iterator<Item = &'a str>) -> Result<Prepared, Failure> {
        let mut prepared = Prepared { arguments: BTreeMap::new(), _microvisor: None };
        for name in used {
            if prepared.arguments.contains_key(name) {
                continue;
            }
            let arguments = match (self.given.get(name), name) {
                (Some(image), _) => vec![path_argument(image)?],
                (None, DEMO) => vec![path_argument(&demo_image()?)?],
                (None, MICROVISOR) => {
                    let file = temporary(microvisor::BYTES)
                        .map_err(|e| Failure::host(format!("the microvisor can't be written: {e}")))?;
                    let path = path_argument(file.path())?;
                    prepared._microvisor = Some(file);
                    vec![format!("--kernel={path}")]
                }
                (None, _) => return Err(Failure::usage(format!("--guest: there is no guest {name}"))),
            };
            prepared.arguments.insert(name.to_owned(), arguments);
        }
        Ok(prepared)
    }
}

fn path_argument(path: &Path) -> Result<String, Failure> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Failure::usage(format!("{}: is not UTF-8; use another name", path.display())))
}

fn temporary(bytes: &[u8]) -> std::io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    file.write_all(bytes)?;
    file.flush()?;
    Ok(file)
}

/// The demonstration image, built unless there is one that is newer than this program.
fn demo_image() -> Result<PathBuf, Failure> {
    let folder = image::cache_folder().ok_or_else(|| {
        Failure::host("there is no home folder to build the demo image in; give --guest demo=FILE")
    })?;
    let path = folder.join("scenario-demo.img");
    let failure = |e: std::io::Error| Failure::host(format!("{}: {e}", path.display()));
    // One process builds, others wait for it.
    let lock = File::create(path.with_extension("lock")).map_err(failure)?;
    lock.lock().map_err(failure)?;
    if !image::is_newer_than_program(&path) {
        let mut options = BuildOptions::new(&path);
        options.force = true;
        let report = image::build(options).map_err(crate::image_command::failure)?;
        report.notices.iter().for_each(|n| eprintln!("note: {n}"));
    }
    Ok(path)
}
