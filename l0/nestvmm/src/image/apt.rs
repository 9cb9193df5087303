//! Getting packages from the running Debian or Ubuntu system's sources, without being
//! root: `apt-cache show` to look them up and `apt-get download` to fetch them. When the
//! system's package lists are missing or out of date, private ones are made.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

use super::ImageError;
use super::progress::Step;
use crate::interrupt;

/// The stanza of a package in the package lists, as far as it is needed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Package {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// First alternative of each dependency, without versions.
    pub depends: Vec<String>,
    /// Base name of the package's file.
    file_name: String,
    /// Its size in bytes.
    size: u64,
    /// Its SHA-256 in lower-case hexadecimal.
    sha256: String,
}

impl Package {
    fn parse(stanza: &str) -> Self {
        let mut package = Self::default();
        for (key, value) in stanza.lines().filter_map(|l| l.split_once(": ")) {
            let value = value.trim();
            match key {
                "Package" => package.name = value.into(),
                "Version" => package.version = value.into(),
                "Depends" | "Pre-Depends" => package.depends.extend(dependencies(value)),
                "Filename" => package.file_name = value.rsplit('/').next().unwrap_or(value).into(),
                "Size" => package.size = value.parse().unwrap_or(0),
                "SHA256" => package.sha256 = value.to_ascii_lowercase(),
                _ => {}
            }
        }
        package
    }
}

fn dependencies(value: &str) -> impl Iterator<Item = String> {
    value.split(',').filter_map(|d| {
        let first = d.split('|').next()?.trim();
        let name = first.split([' ', '(', ':']).next()?;
        (!name.is_empty()).then(|| name.to_owned())
    })
}

/// The running system's apt.
#[derive(Debug)]
pub(super) struct Apt {
    /// Where downloads are kept.
    cache: PathBuf,
    /// Options that make apt use private lists.
    private: Vec<String>,
}

impl Apt {
    /// Apt with downloads kept in `cache`.
    pub(super) fn new(cache: &Path) -> Result<Self, ImageError> {
        let packages = cache.join("packages");
        fs::create_dir_all(&packages).map_err(|source| ImageError::Read { path: packages, source })?;
        Ok(Self { cache: cache.to_owned(), private: Vec::new() })
    }

    fn command(&self, program: &'static str) -> Command {
        let mut command = Command::new(program);
        // As root apt would switch to a user that can't write where we download to.
        command.args(["-o", "APT::Sandbox::User=root"]).args(&self.private).env("LC_ALL", "C");
        command.stdin(Stdio::null());
        command
    }

    fn run(command: &mut Command, program: &'static str) -> Result<Output, ImageError> {
        command.output().map_err(|e| spawn_error(e, program))
    }

    /// Looks up `name`, with private package lists if the system's don't know it.
    pub(super) fn show(&mut self, name: &str) -> Result<Package, ImageError> {
        if let Some(package) = self.lookup(name)? {
            return Ok(package);
        }
        if self.private.is_empty() {
            self.make_lists()?;
            if let Some(package) = self.lookup(name)? {
                return Ok(package);
            }
        }
        Err(ImageError::NoPackage { package: name.into(), detail: String::new() })
    }

    fn lookup(&self, name: &str) -> Result<Option<Package>, ImageError> {
        // A name that starts with a dash would be an option.
        let valid = |c: char| c.is_ascii_alphanumeric() || "+-.:".contains(c);
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(valid) {
            let detail = ": that is not a package name".into();
            return Err(ImageError::NoPackage { package: name.into(), detail });
        }
        let mut command = self.command("apt-cache");
        command.args(["--no-all-versions", "show", name]);
        let output = Self::run(&mut command, "apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let stanza = text.split("\n\n").next().unwrap_or_default();
        let package = Package::parse(stanza);
        // A package that is only installed has no file that could be fetched.
        Ok((output.status.success() && !package.file_name.is_empty()).then_some(package))
    }

    /// Downloads package lists into the cache, and uses them from now on.
    fn make_lists(&mut self) -> Result<(), ImageError> {
        let lists = self.cache.join("apt/lists");
        for dir in [lists.join("partial"), self.cache.join("apt/cache/archives/partial")] {
            fs::create_dir_all(&dir).map_err(|source| ImageError::Read { path: dir, source })?;
        }
        for (key, dir) in [("Dir::State::lists", &lists), ("Dir::Cache", &self.cache.join("apt/cache"))] {
            self.private.extend(["-o".into(), format!("{key}={}", dir.display())]);
        }
        let step = Step::percent("fetching package lists");
        let mut command = self.command("apt-get");
        command.args([
            "-q=2",
            "-o",
            "APT::Status-Fd=1",
            "-o",
            "APT::Update::Post-Invoke-Success::=true",
            "update",
        ]);
        run_with_status(&mut command, "apt-get update", &step)
    }

    /// Fetches `package` and returns its file in the cache.
    pub(super) fn download(&mut self, package: &Package) -> Result<PathBuf, ImageError> {
        let kept = self.cache.join("packages").join(&package.file_name);
        if verify(&kept, package).is_ok() {
            return Ok(kept);
        }
        match self.fetch(package, &kept) {
            // The lists may name a version that the mirror has replaced meanwhile.
            Err(ImageError::Apt { .. }) if self.private.is_empty() => {
                self.make_lists()?;
                let current = self.show(&package.name)?;
                let kept = self.cache.join("packages").join(&current.file_name);
                self.fetch(&current, &kept)?;
                Ok(kept)
            }
            other => other.map(|()| kept),
        }
    }

    fn fetch(&self, package: &Package, kept: &Path) -> Result<(), ImageError> {
        let wrap = |source| ImageError::Read { path: self.cache.clone(), source };
        let (scratch, _guard) = interrupt::scratch_dir(|| tempfile::tempdir_in(&self.cache)).map_err(wrap)?;
        let label = format!("downloading {} {} ({})", package.name, package.version, mebibytes(package.size));
        let step = Step::percent(&label);
        let mut command = self.command("apt-get");
        command.args(["-q=2", "-o", "APT::Status-Fd=1", "download"]);
        command.arg(format!("{}={}", package.name, package.version)).current_dir(scratch.path());
        run_with_status(&mut command, "apt-get download", &step)?;
        let mut files = fs::read_dir(scratch.path()).map_err(wrap)?.flatten().map(|e| e.path());
        let file = files.find(|p| p.extension().is_some_and(|e| e == "deb"));
        let bad = |reason: String| ImageError::BadDownload { package: package.name.clone(), reason };
        let file = file.ok_or_else(|| bad("apt-get download made no file".into()))?;
        verify(&file, package).map_err(bad)?;
        fs::rename(&file, kept).map_err(wrap)
    }
}

/// Checks size and SHA-256 of a package's file.
fn verify(path: &Path, package: &Package) -> Result<(), String> {
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let len = file.metadata().map_err(|e| e.to_string())?.len();
    if len != package.size {
        return Err(format!("the file has {len} bytes instead of {}", package.size));
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(|e| e.to_string())? {
            0 => break,
            n => hash.update(buffer.get(..n).unwrap_or_default()),
        }
    }
    let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    // Apt has checked it as well; lists without SHA-256 are beyond what we can check again.
    if !package.sha256.is_empty() && found != package.sha256 {
        return Err(format!("its SHA-256 is {found} instead of {}", package.sha256));
    }
    Ok(())
}

/// Runs an apt command that reports its progress on standard output.
fn run_with_status(command: &mut Command, name: &str, step: &Step) -> Result<(), ImageError> {
    // A process group of its own: apt has processes that fetch.
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let kill = |child: &std::process::Child| -> interrupt::Undo {
        let group = rustix::process::Pid::from_child(child);
        Box::new(move || {
            // It may have ended by itself.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        })
    };
    let (mut child, guard) =
        interrupt::guarded(|| command.spawn(), kill).map_err(|e| spawn_error(e, "apt-get"))?;
    // Standard error is short; it is read on a thread all the same, so that it can't fill up.
    let stderr = child.stderr.take();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(e) = stderr {
            // What can't be read is no worse than an apt that says nothing.
            let _ = e.take(1 << 20).read_to_string(&mut text);
        }
        text
    });
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let percent = line.strip_prefix("dlstatus:").and_then(|l| l.split(':').nth(1));
            if let Some(percent) = percent.and_then(|p| p.parse::<f64>().ok()) {
                step.set(percent.clamp(0.0, 100.0) as u64);
            }
        }
    }
    let failed = |reason: String| ImageError::Apt { command: name.into(), reason };
    // It has closed its output. After waiting, the process id may be somebody else's.
    drop(guard);
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    let text = errors.join().unwrap_or_default();
    if status.success() {
        return Ok(());
    }
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("E:")).collect();
    Err(failed(if lines.is_empty() { format!("it ended with {status}") } else { lines.join(" ") }))
}

fn spawn_error(e: io::Error, program: &'static str) -> ImageError {
    match e.kind() {
        io::ErrorKind::NotFound => ImageError::NoApt { program },
        _ => ImageError::Apt { command: program.into(), reason: e.to_string() },
    }
}

/// A size for people.
pub(super) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stanza() {
        let p = Package::parse(
            "Package: linux-image-cloud-amd64\nVersion: 6.1.1-1\nDepends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1), \
             kmod | other, initramfs-tools:any\nFilename: pool/l/x_6.1.1-1_amd64.deb\nSize: 1504\nSHA256: 00AB\n",
        );
        assert_eq!(p.depends, ["linux-image-6.1.0-1-cloud-amd64", "kmod", "initramfs-tools"]);
        assert_eq!((p.file_name.as_str(), p.size, p.sha256.as_str()), ("x_6.1.1-1_amd64.deb", 1504, "00ab"));
    }

    #[test]
    fn names_that_are_options_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let apt = Apt::new(dir.path()).unwrap();
        for name in ["-o", "", "a b", "a;b", "../x"] {
            assert!(matches!(apt.lookup(name), Err(ImageError::NoPackage { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_damaged_download_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.deb");
        fs::write(&file, b"abc").unwrap();
        // SHA-256 of "abc": FIPS 180-2, appendix B.1.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".to_owned();
        let mut package = Package { size: 3, sha256, ..Package::default() };
        assert_eq!(verify(&file, &package), Ok(()));
        package.size = 4;
        assert!(verify(&file, &package).is_err());
        fs::write(&file, b"abd").unwrap();
        package.size = 3;
        assert!(verify(&file, &package).is_err());
    }
}
