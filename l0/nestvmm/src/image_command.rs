//! `nestvmm image build` and `nestvmm image inspect`.

use std::path::Path;

use crate::cli::{BuildArgs, Compression, ImageCommand, OnOff};
use crate::image::{self, BuildOptions, ImageError, InitrdCompression, Inspection, L2Options};
use crate::interrupt;
use crate::status::Failure;

/// Does what `command` says.
///
/// # Errors
/// [`Failure`] with the status to end with.
pub fn image(command: ImageCommand) -> Result<(), Failure> {
    match command {
        ImageCommand::Build(args) => {
            interrupt::handle_signals()?;
            let report = image::build(options(*args));
            interrupt::settle();
            println!("{}", report.map_err(failure)?);
        }
        ImageCommand::Inspect { image: path } => println!("{}", inspect(&path)?),
    }
    Ok(())
}

fn inspect(path: &Path) -> Result<Inspection, Failure> {
    image::inspect(path).map_err(failure)
}

fn options(args: BuildArgs) -> BuildOptions {
    let mut o = BuildOptions::new(args.output);
    o.force = args.force;
    o.kernel_package = args.kernel_package;
    o.kernel_file = args.kernel_file;
    o.modules_dir = args.modules_dir;
    o.modules = args.modules;
    o.busybox = args.busybox;
    o.nestvmm = args.nestvmm;
    o.files = args.files;
    o.command_line = args.append;
    o.l2 = L2Options {
        present: args.l2 == OnOff::On,
        kernel_package: args.l2_kernel_package,
        kernel_file: args.l2_kernel_file,
        files: args.l2_files,
        command_line: args.l2_append,
    };
    o.compression = match args.compression {
        Compression::None => InitrdCompression::None,
        Compression::Gzip => InitrdCompression::Gzip,
        Compression::Lz4 => InitrdCompression::Lz4,
    };
    o
}

/// An error of image building, with the status to end with.
pub fn failure(e: ImageError) -> Failure {
    match e {
        ImageError::NoApt { .. } | ImageError::Apt { .. } => Failure::host(e),
        ImageError::BadOption(_) | ImageError::Exists { .. } => Failure::usage(e),
        _ => Failure::input(e),
    }
}
