//! Builds the bare-metal image beside the library.
//!
//! It is one `no_std` crate without dependencies, compiled by a direct call of `rustc`: it needs
//! `panic=abort`, a static relocation model and its own linker script, none of which Cargo lets
//! one package of a workspace choose for itself.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn sources(dir: &Path) {
    for entry in fs::read_dir(dir).expect("the source folder is readable") {
        let path = entry.expect("its entries are readable").path();
        if path.is_dir() {
            sources(&path);
        }
        println!("cargo::rerun-if-changed={}", path.display());
    }
}

fn main() {
    let var = |name: &str| env::var(name).unwrap_or_else(|_| panic!("Cargo sets {name}"));
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=image.ld");
    println!("cargo::rerun-if-changed=src");
    sources(Path::new("src"));
    let image = Path::new(&var("OUT_DIR")).join("microvisor");
    println!("cargo::rustc-env=MICROVISOR_IMAGE={}", image.display());
    let script = Path::new(&var("CARGO_MANIFEST_DIR")).join("image.ld");
    let status = Command::new(var("RUSTC"))
        .args(["--edition=2024", "--crate-name=microvisor", "--crate-type=bin"])
        .args(["--target", &var("TARGET")])
        .args(["-Copt-level=2", "-Cpanic=abort", "-Crelocation-model=static", "-Cdebuginfo=0"])
        // Interrupts and VM exits may use the stack below RSP.
        .args(["-Cno-redzone=yes", "-Cforce-frame-pointers=no", "-Ccodegen-units=8"])
        .args(["-Ctarget-feature=+crt-static", "-Awarnings"])
        .args([
            "-Clink-arg=-nostdlib",
            "-Clink-arg=-nostartfiles",
            "-Clink-arg=-static",
            "-Clink-arg=-no-pie",
        ])
        .args(["-Clink-arg=-Wl,--build-id=none", "-Clink-arg=-Wl,-z,max-page-size=0x1000"])
        .arg("-Clink-arg=-Wl,-z,noexecstack")
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&image)
        .arg("src/image.rs")
        .status()
        .expect("rustc can be started");
    assert!(status.success(), "the image does not build: {status}");
}
