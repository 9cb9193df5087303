//! `nestvmm image`: building the demonstration L1, which holds an L2, as a disk image, and showing
//! what is in an image.
//!
//! Not supported: root file systems beside the initrd, signatures (Secure Boot), kernels
//! for anything but x86-64.

mod apt;
mod cpio;
mod deb;
mod disk;
mod error;
mod initrd;
mod inspect;
mod kmod;
mod progress;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use machine::boot::{self, BootFile};

pub use error::ImageError;
pub use initrd::InitrdCompression;
pub use inspect::{Inspection, inspect};

use crate::interrupt;

use apt::{Apt, mebibytes};
use initrd::Level;
use kmod::{ModulesDir, PackedModules, Resolved};

/// The package that a kernel comes from unless another is asked for.
pub const DEFAULT_KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// The kernel's command line unless another is asked for: messages below warnings stay in
/// the kernel's log.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 loglevel=4";
/// The package that busybox comes from.
const BUSYBOX_PACKAGE: &str = "busybox-static";
/// The modules that an L1 needs to be a hypervisor.
const KVM_MODULES: [&str; 4] = ["kvm", "kvm_intel", "kvm_amd", "irqbypass"];
/// The drivers of the machine's devices; kernels may have them built in.
const DEVICE_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_rng", "nvme"];
/// Largest input file, in bytes.
const FILE_MAX: u64 = 1 << 30;

/// What to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// The image file to write.
    pub output: PathBuf,
    /// Replace the image if there is one.
    pub force: bool,
    /// Package to take the kernel and its modules from.
    pub kernel_package: String,
    /// A kernel file to take instead of a package.
    pub kernel_file: Option<PathBuf>,
    /// The kernel file's modules (`/lib/modules/VERSION`).
    pub modules_dir: Option<PathBuf>,
    /// Modules to take in addition to KVM's.
    pub modules: Vec<String>,
    /// A statically linked busybox to take instead of the package's.
    pub busybox: Option<PathBuf>,
    /// A statically linked nestvmm; `None` looks for one.
    pub nestvmm: Option<PathBuf>,
    /// More files for L1's initrd: host file and path in L1.
    pub files: Vec<(PathBuf, String)>,
    /// What L2 is made of.
    pub l2: L2Options,
    /// Kernel command line.
    pub command_line: String,
    /// How the initrd is packed.
    pub compression: InitrdCompression,
}

/// What L2 is made of. Its user space is the same as L1's.
#[derive(Clone, Debug)]
pub struct L2Options {
    /// Whether there is one.
    pub present: bool,
    /// Package to take the kernel and its modules from; `None` takes L1's kernel.
    pub kernel_package: Option<String>,
    /// A kernel file to take instead of a package.
    pub kernel_file: Option<PathBuf>,
    /// More files for L2's initrd: host file and path in L2.
    pub files: Vec<(PathBuf, String)>,
    /// Kernel command line.
    pub command_line: String,
}

impl Default for L2Options {
    fn default() -> Self {
        Self {
            present: true,
            kernel_package: None,
            kernel_file: None,
            files: Vec::new(),
            command_line: DEFAULT_COMMAND_LINE.into(),
        }
    }
}

impl BuildOptions {
    /// The defaults for image `output`.
    pub fn new(output: impl Into<PathBuf>) -> Self {
        Self {
            output: output.into(),
            force: false,
            kernel_package: DEFAULT_KERNEL_PACKAGE.into(),
            kernel_file: None,
            modules_dir: None,
            modules: Vec::new(),
            busybox: None,
            nestvmm: None,
            files: Vec::new(),
            l2: L2Options::default(),
            command_line: DEFAULT_COMMAND_LINE.into(),
            compression: InitrdCompression::None,
        }
    }
}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildReport {
    /// The image.
    pub output: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Release of the kernel in it (`uname -r`).
    pub kernel_release: String,
    /// Where the kernel came from.
    pub kernel_source: String,
    /// Names of its modules.
    pub modules: Vec<String>,
    /// Size of the initrd in bytes.
    pub initrd_size: u64,
    /// Release of L2's kernel and where it came from, if there is an L2.
    pub l2_kernel: Option<(String, String)>,
    /// Whether nestvmm itself is in it.
    pub has_nestvmm: bool,
    /// What the user should know.
    pub notices: Vec<String>,
}

impl fmt::Display for BuildReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({})", self.output.display(), mebibytes(self.size))?;
        writeln!(f, "  kernel   {} from {}", self.kernel_release, self.kernel_source)?;
        let modules = if self.modules.is_empty() { "none".into() } else { self.modules.join(", ") };
        writeln!(f, "  modules  {modules}")?;
        writeln!(f, "  initrd   {}", mebibytes(self.initrd_size))?;
        match &self.l2_kernel {
            Some((release, source)) => {
                writeln!(f, "  L2       {release} from {source}; boot-l2 in L1 boots it")?
            }
            None => writeln!(f, "  L2       none")?,
        }
        write!(f, "  nestvmm  {}", if self.has_nestvmm { "/bin/nestvmm" } else { "none" })?;
        for n in &self.notices {
            write!(f, "\nnote: {n}")?;
        }
        Ok(())
    }
}

/// Where a kernel and its modules come from.
struct KernelSource<'a> {
    package: &'a str,
    file: Option<&'a Path>,
    modules_dir: Option<&'a Path>,
    modules: &'a [String],
}

impl KernelSource<'_> {
    fn get(&self, apt: &mut Apt) -> Result<Kernel, ImageError> {
        let kernel = match self.file {
            Some(path) => kernel_from_file(path, self)?,
            None => kernel_from_package(apt, self)?,
        };
        for name in self.modules {
            if !kernel.modules.modules.contains_key(&name.replace('-', "_")) {
                return Err(ImageError::BadOption(format!("kernel {} has no module {name}", kernel.release)));
            }
        }
        Ok(kernel)
    }

    fn wanted(&self) -> Vec<&str> {
        KVM_MODULES.into_iter().chain(DEVICE_MODULES).chain(self.modules.iter().map(String::as_str)).collect()
    }
}

/// A kernel and its modules.
struct Kernel {
    file: BootFile,
    release: String,
    source: String,
    modules: Resolved,
}

/// Builds an image. Progress goes to standard error.
///
/// # Errors
/// [`ImageError`]; the image file is only written when everything else is done.
pub fn build(options: BuildOptions) -> Result<BuildReport, ImageError> {
    check_output(&options)?;
    if options.modules_dir.is_some() && options.kernel_file.is_none() {
        return Err(ImageError::BadOption(
            "--modules-dir goes with --kernel-file: a package brings its own modules".into(),
        ));
    }
    let mut notices = Vec::new();
    // Files are looked at before anything is downloaded: their errors come at once.
    let (nestvmm, notice) = find_nestvmm(options.nestvmm.as_deref())?;
    let nestvmm = nestvmm.map(|n| without_debug_information(n.data));
    notices.extend(notice);
    let extra = extra_files(&options.files)?;
    let l2_extra = extra_files(&options.l2.files)?;
    let own_busybox = match &options.busybox {
        Some(path) => Some(static_program(path, "--busybox")?),
        None => None,
    };
    let cache = Cache::open()?;
    let mut apt = Apt::new(cache.path())?;
    let source = KernelSource {
        package: &options.kernel_package,
        file: options.kernel_file.as_deref(),
        modules_dir: options.modules_dir.as_deref(),
        modules: &options.modules,
    };
    let kernel = source.get(&mut apt)?;
    notices.extend(module_notice("L1", &kernel));
    let own_l2_kernel = l2_kernel(&options, &mut apt)?;
    notices.extend(own_l2_kernel.as_ref().and_then(|k| module_notice("L2", k)));
    let busybox = match own_busybox {
        Some(b) => b,
        None => busybox_from_package(&mut apt)?,
    };
    let applets = list_applets(&busybox);
    let archive = |level, kernel: &Kernel, extra| {
        initrd::archive(&initrd::Contents {
            level,
            release: &kernel.release,
            modules: &kernel.modules,
            busybox: &busybox.data,
            applets: &applets,
            nestvmm: nestvmm.as_deref(),
            extra,
        })
    };
    let write = |source| ImageError::Write { path: options.output.clone(), source };

    // Without nestvmm in L1, nothing there could boot an L2.
    let l2_kernel =
        (options.l2.present && nestvmm.is_some()).then(|| own_l2_kernel.as_ref().unwrap_or(&kernel));
    let l2 = match l2_kernel {
        None => None,
        Some(kernel) => Some(initrd::L2 {
            kernel: kernel.file.data.clone(),
            initrd: initrd::pack(archive(Level::L2, kernel, &l2_extra), options.compression)
                .map_err(write)?,
            options: options.l2.command_line.clone(),
        }),
    };
    let archive = archive(Level::L1(l2.as_ref()), &kernel, &extra);
    let initrd = initrd::pack(archive, options.compression).map_err(write)?;
    let size = write_image(&options, &kernel, &initrd).map_err(write)?;
    Ok(BuildReport {
        output: options.output.clone(),
        size,
        initrd_size: initrd.len() as u64,
        has_nestvmm: nestvmm.is_some(),
        l2_kernel: l2_kernel.map(|k| (k.release.clone(), k.source.clone())),
        notices,
        kernel_release: kernel.release,
        kernel_source: kernel.source,
        modules: kernel.modules.modules.into_keys().collect(),
    })
}

/// L2's kernel, if it is to be another than L1's.
fn l2_kernel(options: &BuildOptions, apt: &mut Apt) -> Result<Option<Kernel>, ImageError> {
    let l2 = &options.l2;
    if !l2.present || (l2.kernel_file.is_none() && l2.kernel_package.is_none()) {
        return Ok(None);
    }
    let source = KernelSource {
        package: l2.kernel_package.as_deref().unwrap_or(DEFAULT_KERNEL_PACKAGE),
        file: l2.kernel_file.as_deref(),
        modules_dir: None,
        modules: &[],
    };
    source.get(apt).map(Some)
}

/// Refuses an output that can't be written before any work is done for it.
fn check_output(options: &BuildOptions) -> Result<(), ImageError> {
    let path = &options.output;
    let writable = || {
        let scratch = tempfile::tempfile_in(disk::directory_of(path));
        scratch.map(drop).map_err(|source| ImageError::Write { path: path.clone(), source })
    };
    match std::fs::symlink_metadata(path) {
        Ok(m) if m.is_file() && options.force => writable(),
        Ok(m) if m.is_file() => Err(ImageError::Exists { path: path.clone() }),
        Ok(_) => {
            let source = std::io::Error::other("there is something that is not a file");
            Err(ImageError::Write { path: path.clone(), source })
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => writable(),
        Err(source) => Err(ImageError::Write { path: path.clone(), source }),
    }
}

fn write_image(options: &BuildOptions, kernel: &Kernel, initrd: &[u8]) -> std::io::Result<u64> {
    let base = format!("nestvmm/{}", kernel.release);
    let entry = format!(
        "title nestvmm demonstration L1 (Linux {release})\nversion {release}\nsort-key nestvmm\narchitecture x64\n\
         linux /{base}/linux\ninitrd /{base}/initrd\noptions {options}\n",
        release = kernel.release,
        options = options.command_line,
    );
    let loader = "default nestvmm.conf\ntimeout 0\n";
    let files = [
        ("loader/loader.conf".to_owned(), loader.as_bytes()),
        ("loader/entries/nestvmm.conf".to_owned(), entry.as_bytes()),
        (format!("{base}/linux"), kernel.file.data.as_slice()),
        (format!("{base}/initrd"), initrd),
    ];
    disk::write(&options.output, &files)
}

fn module_notice(level: &str, kernel: &Kernel) -> Option<String> {
    let missing: Vec<&str> = kernel.modules.missing.iter().map(String::as_str).collect();
    let missing: Vec<&str> = missing.into_iter().filter(|m| !DEVICE_MODULES.contains(m)).collect();
    if missing.is_empty() {
        return None;
    }
    let missing = missing.join(", ");
    Some(format!("no module file for {missing}: {level} has {missing} only if the kernel has it built in"))
}

/// The kernel's release: the first word of the version string in its header.
fn kernel_release(file: &BootFile) -> Result<String, ImageError> {
    let header = boot::parse_setup_header(&file.name, &file.data)?;
    let version = boot::version_string(&header, &file.data).unwrap_or_default();
    let release = version.split_whitespace().next().unwrap_or_default();
    // It becomes a directory's name.
    let valid = |c: char| c.is_ascii_alphanumeric() || "._+-~".contains(c);
    if release.is_empty() || release.starts_with('.') || !release.chars().all(valid) {
        return Err(ImageError::BadOption(format!("{}: the kernel has no usable version string", file.name)));
    }
    Ok(release.to_owned())
}

fn kernel_from_file(path: &Path, source: &KernelSource<'_>) -> Result<Kernel, ImageError> {
    let file = machine::image::read_file(path, FILE_MAX)?;
    let release = kernel_release(&file)?;
    let modules = match source.modules_dir {
        Some(dir) => kmod::resolve(&ModulesDir::scan(dir)?, &source.wanted())?,
        None => kmod::resolve(&PackedModules::default(), &source.wanted())?,
    };
    Ok(Kernel { source: path.display().to_string(), file, release, modules })
}

fn kernel_from_package(apt: &mut Apt, from: &KernelSource<'_>) -> Result<Kernel, ImageError> {
    let mut package = apt.show(from.package)?;
    // From "linux-image-amd64" to "linux-image-6.1.0-13-amd64", maybe over another step.
    for _ in 0..4 {
        let Some(next) = package.depends.iter().find(|d| is_versioned(d, "linux-image-")) else { break };
        if *next == package.name {
            break;
        }
        package = apt.show(&next.clone())?;
    }
    let mut source = PackedModules::default();
    let mut kernels = Vec::new();
    // Ubuntu has the modules in a package of their own.
    let companions: Vec<String> =
        package.depends.iter().filter(|d| is_versioned(d, "linux-modules-")).cloned().collect();
    let mut files = vec![apt.download(&package)?];
    for name in companions {
        let companion = apt.show(&name)?;
        files.push(apt.download(&companion)?);
    }
    for path in files {
        let keep = |p: &str| p.starts_with("boot/vmlinuz") || kmod::module_name(p).is_some();
        for f in deb::extract(&path, keep)? {
            if f.path.starts_with("boot/") {
                kernels.push(f);
            } else {
                source.add(&f.path, f.data);
            }
        }
    }
    let found = kernels.pop().ok_or_else(|| ImageError::NotInPackage {
        package: package.name.clone(),
        what: "kernel (boot/vmlinuz-*)",
    })?;
    let file = BootFile { name: format!("{}: {}", package.name, found.path), data: found.data };
    let release = kernel_release(&file)?;
    let modules = kmod::resolve(&source, &from.wanted())?;
    let source = format!("package {} {}", package.name, package.version);
    Ok(Kernel { file, release, source, modules })
}

/// Whether `name` is `prefix` and a version.
fn is_versioned(name: &str, prefix: &str) -> bool {
    let unsigned = format!("{prefix}unsigned-");
    let rest = name.strip_prefix(&unsigned).or_else(|| name.strip_prefix(prefix));
    rest.is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()))
}

fn busybox_from_package(apt: &mut Apt) -> Result<BootFile, ImageError> {
    let package = apt.show(BUSYBOX_PACKAGE)?;
    let path = apt.download(&package)?;
    let mut files = deb::extract(&path, |p| p == "bin/busybox" || p == "usr/bin/busybox")?;
    let found = files
        .pop()
        .ok_or(ImageError::NotInPackage { package: package.name, what: "busybox program (bin/busybox)" })?;
    Ok(BootFile { name: BUSYBOX_PACKAGE.into(), data: found.data })
}

/// The applets that this busybox has, by its own account. None if it does not run here, as
/// on a host of another architecture; L1 finds out for itself then.
fn list_applets(busybox: &BootFile) -> Vec<String> {
    // In memory: there is no file that could be left behind.
    let output = (|| {
        let fd = rustix::fs::memfd_create("busybox", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        std::io::Write::write_all(&mut std::fs::File::from(fd.try_clone().ok()?), &busybox.data).ok()?;
        let mut command = Command::new(path);
        // By its name it would look for the applet.
        std::os::unix::process::CommandExt::arg0(&mut command, "busybox");
        command.arg("--list").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()
    })();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let valid =
        |a: &&str| !a.is_empty() && a.chars().all(|c| c.is_ascii_alphanumeric() || "_-[.+".contains(c));
    text.lines().map(str::trim).filter(valid).map(str::to_owned).collect()
}

/// Reads a program that has to run without a dynamic linker.
fn static_program(path: &Path, option: &'static str) -> Result<BootFile, ImageError> {
    let file = machine::image::read_file(path, FILE_MAX)?;
    match static_problem(&file.data) {
        None => Ok(file),
        Some(reason) => Err(ImageError::NotStatic { path: path.to_owned(), reason, option }),
    }
}

/// Why `data` is no static x86-64 program.
fn static_problem(data: &[u8]) -> Option<&'static str> {
    use object::read::elf::{FileHeader, ProgramHeader};
    let Ok(header) = object::elf::FileHeader64::<object::LittleEndian>::parse(data) else {
        return Some("is not a 64-bit ELF program");
    };
    let e = object::LittleEndian;
    if header.e_machine(e) != object::elf::EM_X86_64 {
        return Some("is not for x86-64");
    }
    match header.program_headers(e, data) {
        Ok(headers) if headers.iter().any(|h| h.p_type(e) == object::elf::PT_INTERP) => {
            Some("is dynamically linked")
        }
        Ok([]) | Err(_) => Some("is a damaged ELF program"),
        Ok(_) => None,
    }
}

/// Cuts what is not loaded, debug information above all, off an ELF program: in L1 it would
/// take RAM. Linkers put it after everything that is loaded.
fn without_debug_information(mut data: Vec<u8>) -> Vec<u8> {
    use object::read::elf::{FileHeader, ProgramHeader};
    let e = object::LittleEndian;
    let header = object::elf::FileHeader64::<object::LittleEndian>::parse(data.as_slice());
    let Ok(headers) = header.and_then(|h| h.program_headers(e, data.as_slice())) else { return data };
    let end = headers.iter().map(|h| h.p_offset(e).saturating_add(h.p_filesz(e))).max().unwrap_or(0);
    let end = usize::try_from(end).unwrap_or(usize::MAX).max(64);
    if end < data.len() {
        data.truncate(end);
        // e_shoff, then e_shnum and e_shstrndx: the section headers went too.
        for range in [40..48, 60..64] {
            data.get_mut(range).unwrap_or_default().fill(0);
        }
    }
    data
}

/// The nestvmm to put into the image: the one asked for, else the running one if it is
/// static, else a static one built beside it. Else none, and a notice that says so.
fn find_nestvmm(asked: Option<&Path>) -> Result<(Option<BootFile>, Option<String>), ImageError> {
    if let Some(path) = asked {
        return Ok((Some(static_program(path, "--nestvmm")?), None));
    }
    let mut candidates = Vec::new();
    if let Ok(own) = std::env::current_exe() {
        candidates.push(own.clone());
        if let Some(dir) = own.parent() {
            candidates.push(dir.join("nestvmm-static"));
            // target/PROFILE/nestvmm and target/TRIPLE/PROFILE/nestvmm.
            for target in ["x86_64-unknown-linux-gnu", "x86_64-unknown-linux-musl"] {
                for profile in ["release", "debug"] {
                    candidates.push(dir.join("..").join(target).join(profile).join("nestvmm"));
                }
            }
        }
    }
    // The running program may be a test or another program that uses these modules.
    let named = |p: &&PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("nestvmm"));
    for path in candidates.iter().filter(named) {
        if let Ok(file) = static_program(path, "--nestvmm") {
            return Ok((Some(file), None));
        }
    }
    let notice = "nestvmm itself is not in the image: there is no statically linked one; build it with \
                  RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target \
                  x86_64-unknown-linux-gnu -p nestvmm, or give one with --nestvmm";
    Ok((None, Some(notice.into())))
}

fn extra_files(files: &[(PathBuf, String)]) -> Result<Vec<(String, u32, Vec<u8>)>, ImageError> {
    files.iter().map(|(from, to)| extra_file(from, to)).collect()
}

fn extra_file(from: &Path, to: &str) -> Result<(String, u32, Vec<u8>), ImageError> {
    let clean = to.trim_start_matches('/');
    if clean.is_empty() || clean.ends_with('/') || clean.split('/').any(|p| matches!(p, "" | "." | "..")) {
        return Err(ImageError::BadOption(format!("{to:?} is not a path of a file in the guest")));
    }
    let read = |source| ImageError::Read { path: from.to_owned(), source };
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(from).map_err(read)?.permissions());
    let data = std::fs::read(from).map_err(read)?;
    Ok((clean.to_owned(), mode & 0o777, data))
}

/// The folder that nestvmm keeps things in that it can make again, made if need be. `None` without a home
/// directory.
pub fn cache_folder() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|h| h.join(".cache")));
    base.map(|b| b.join("nestvmm")).filter(|dir| std::fs::create_dir_all(dir).is_ok())
}

/// Whether `image` was made after this program, which it has in it.
pub fn is_newer_than_program(image: &Path) -> bool {
    let modified = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    let program = std::env::current_exe().ok().and_then(|p| modified(&p));
    matches!((modified(image), program), (Some(i), Some(p)) if i > p)
}

/// Where downloads are kept between builds.
enum Cache {
    Kept(PathBuf),
    /// Without a home directory nothing is kept.
    Scratch(tempfile::TempDir, #[expect(dead_code, reason = "kept for its drop")] interrupt::Guard),
}

impl Cache {
    fn open() -> Result<Self, ImageError> {
        if let Some(dir) = cache_folder() {
            return Ok(Self::Kept(dir));
        }
        let scratch = interrupt::scratch_dir(tempfile::tempdir);
        scratch
            .map(|(dir, guard)| Self::Scratch(dir, guard))
            .map_err(|source| ImageError::Read { path: std::env::temp_dir(), source })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(p) => p,
            Self::Scratch(d, _) => d.path(),
        }
    }
}

#[cfg(test)]
mod tests;
