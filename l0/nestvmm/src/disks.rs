//! The files that are the guest's disks: opened, locked against another run's writes, and checked before the machine is made.
//!
//! Not supported: formats other than raw, snapshots.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::sync::Arc;

use devices::disk::FileDisk;
use machine::image::{self, ImageKind};
use machine::pci::Disk;

use crate::cli::{DiskFile, ImageDisk, RunArgs};
use crate::status::Failure;

/// The disks of a run.
#[derive(Default)]
pub struct Disks {
    /// Virtio disks: that of the image first, if there is one.
    pub virtio: Vec<Disk>,
    /// NVMe disks.
    pub nvme: Vec<Disk>,
}

/// Opens the disks of a run.
///
/// # Errors
/// [`Failure`] for a file that can't be a disk.
pub fn open(args: &RunArgs) -> Result<Disks, Failure> {
    let image = args.image.as_deref().filter(|_| args.image_disk != ImageDisk::Off);
    let mut disks = Disks::default();
    if let Some(path) = image
        && image::detect(path).map_err(Failure::input)? == ImageKind::Disk
    {
        disks.virtio.push(open_disk(path, args.image_disk == ImageDisk::Ro, "image")?);
    }
    for (i, DiskFile { path, read_only }) in args.disks.iter().enumerate() {
        disks.virtio.push(open_disk(path, *read_only, &format!("disk{i}"))?);
    }
    for (i, DiskFile { path, read_only }) in args.nvme.iter().enumerate() {
        disks.nvme.push(open_disk(path, *read_only, &format!("nvme{i}"))?);
    }
    Ok(disks)
}

/// Opens the file of a disk that calls itself `serial`.
fn open_disk(path: &Path, read_only: bool, serial: &str) -> Result<Disk, Failure> {
    let fail = |what: String| Failure::input(format!("disk {}: {what}", path.display()));
    let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(|e| {
        let remedy =
            if read_only { "" } else { "; for a disk that is only read, write \",ro\" after the name" };
        fail(format!("can't be opened: {e}{remedy}"))
    })?;
    lock(&file, read_only).map_err(&fail)?;
    let disk = FileDisk::new(file, read_only).map_err(|e| fail(e.to_string()))?;
    Ok(Disk { storage: Arc::new(disk), serial: serial.to_owned() })
}

/// A disk that is written is no other run's, whether that writes or reads.
fn lock(file: &File, read_only: bool) -> Result<(), String> {
    match if read_only { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err("another run has it open, and one of the two wants to write it".to_owned())
        }
        // Some file systems have no locks; reading does no harm.
        Err(TryLockError::Error(_)) if read_only => Ok(()),
        Err(TryLockError::Error(e)) => Err(format!("can't be locked: {e}")),
    }
}
