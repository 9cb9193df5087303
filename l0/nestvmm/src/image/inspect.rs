//! `nestvmm image inspect`: what is in an image.

use std::fmt;
use std::path::Path;

use machine::boot::{self, BootFile, Compression};
use machine::image::{self, DiskContents, ImageKind, PartitionRole};

use super::ImageError;
use super::apt::mebibytes;

/// Largest kernel or initrd looked at, in bytes.
const FILE_MAX: u64 = 2 << 30;

/// What is in an image, to be printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The image's name.
    pub file: String,
    /// What the file is.
    pub kind: ImageKind,
    /// The disk, if it is one.
    pub disk: Option<DiskContents>,
    /// For each boot entry of the disk its kernel, or the image itself.
    pub kernels: Vec<Result<KernelInfo, String>>,
}

/// What can be said about a kernel and its initrd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelInfo {
    /// Size of the kernel's file in bytes.
    pub size: u64,
    /// What the kernel is.
    pub format: String,
    /// Version string.
    pub version: Option<String>,
    /// Size and compression of the initrd.
    pub initrd: Option<(u64, &'static str)>,
}

/// Looks into the image at `path`.
///
/// # Errors
/// [`ImageError::Image`] when it can't be read or is no image.
pub fn inspect(path: &Path) -> Result<Inspection, ImageError> {
    let kind = image::detect(path)?;
    let file = path.display().to_string();
    if kind != ImageKind::Disk {
        let source = image::open(path, None, FILE_MAX)?;
        let kernels = vec![Ok(describe(&source.kernel, None)?)];
        return Ok(Inspection { file, kind, disk: None, kernels });
    }
    let disk = image::read_disk(path)?;
    // One bad entry does not hide the others.
    let kernel = |id: &str| -> Result<KernelInfo, ImageError> {
        let source = image::open(path, Some(id), FILE_MAX)?;
        describe(&source.kernel, source.initrd.as_ref())
    };
    let kernels = disk.entries.iter().map(|e| kernel(&e.id).map_err(|e| e.to_string())).collect();
    Ok(Inspection { file, kind, disk: Some(disk), kernels })
}

fn describe(kernel: &BootFile, initrd: Option<&BootFile>) -> Result<KernelInfo, ImageError> {
    let size = kernel.data.len() as u64;
    let unpacked = boot::unpack_file(kernel, FILE_MAX)?;
    let kernel = unpacked.as_ref().unwrap_or(kernel);
    let mut info =
        KernelInfo { size, format: String::new(), version: None, initrd: initrd.map(|i| packed(&i.data)) };
    if boot::is_bzimage(&kernel.data) {
        linux(&mut info, &kernel.name, &kernel.data)?;
    } else if boot::is_pe(&kernel.data) {
        let uki = boot::parse_uki(&kernel.name, &kernel.data)?;
        linux(&mut info, &kernel.name, uki.linux)?;
        info.format = format!("unified kernel image, {}", info.format);
        info.initrd = info.initrd.or(uki.initrd.map(packed));
    } else if boot::find_multiboot_header(&kernel.data).is_some() {
        info.format = "multiboot 1".into();
    } else {
        info.format = "ELF".into();
    }
    if unpacked.is_some() {
        info.format += ", packed as a whole";
    }
    Ok(info)
}

fn linux(info: &mut KernelInfo, name: &str, data: &[u8]) -> Result<(), ImageError> {
    let header = boot::parse_setup_header(name, data)?;
    let (major, minor) = header.protocol_parts();
    let payload = header.payload.and_then(|(at, _)| data.get(usize::try_from(at).ok()?..));
    let packed = payload.and_then(Compression::detect).map_or("unknown compression", Compression::name);
    info.format = format!("Linux bzImage, boot protocol {major}.{minor:02}, {packed}");
    info.version = boot::version_string(&header, data);
    Ok(())
}

fn packed(data: &[u8]) -> (u64, &'static str) {
    let how = match Compression::detect(data) {
        Some(c) => c.name(),
        None if data.starts_with(b"0707") => "not compressed",
        None => "unknown compression",
    };
    (data.len() as u64, how)
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.kind)?;
        let Some(disk) = &self.disk else {
            return self.kernels.iter().try_for_each(|k| kernel(f, "  ", k));
        };
        write!(
            f,
            "\n\npartition table (GPT {}, blocks of {} bytes)",
            disk.table.guid, disk.table.block_size
        )?;
        for p in &disk.table.partitions {
            let role = match p.role {
                PartitionRole::Esp => "EFI system partition",
                PartitionRole::Xbootldr => "extended boot loader partition",
                PartitionRole::Other => &p.type_guid,
            };
            write!(f, "\n  {}  {:#x}..{:#x}", p.number, p.start, p.start + p.len)?;
            write!(f, "  {}  {:?}  {role}", mebibytes(p.len), p.name)?;
        }
        for v in &disk.volumes {
            write!(f, "\n\nfiles on partition {} ({:?})", v.partition, v.label)?;
            for file in &v.files {
                write!(f, "\n  {:>12}  {}", file.len, file.path)?;
            }
        }
        write!(f, "\n\nboot entries")?;
        if disk.entries.is_empty() {
            write!(f, "\n  none")?;
        }
        for (i, (e, k)) in disk.entries.iter().zip(&self.kernels).enumerate() {
            let default = if disk.default == Some(i) { " (default)" } else { "" };
            write!(f, "\n  {}: {}{default}", e.file_name, e.display_name())?;
            if let Some(path) = e.linux.as_ref().or(e.efi.as_ref()) {
                write!(f, "\n    linux    {path}")?;
            }
            for path in &e.initrds {
                write!(f, "\n    initrd   {path}")?;
            }
            write!(f, "\n    options  {}", e.options.as_deref().unwrap_or(""))?;
            kernel(f, "    ", k)?;
        }
        Ok(())
    }
}

fn kernel(f: &mut fmt::Formatter<'_>, indent: &str, k: &Result<KernelInfo, String>) -> fmt::Result {
    match k {
        Err(reason) => write!(f, "\n{indent}can't be started: {reason}"),
        Ok(k) => {
            write!(f, "\n{indent}kernel   {} ({})", k.format, mebibytes(k.size))?;
            if let Some(v) = &k.version {
                write!(f, "\n{indent}version  {v}")?;
            }
            if let Some((size, how)) = k.initrd {
                write!(f, "\n{indent}initrd   {}, {how}", mebibytes(size))?;
            }
            Ok(())
        }
    }
}
