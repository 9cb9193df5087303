//! Loading built-up kernels of each format, and files damaged in every way.

use memory::{L1Gpa, L1Ram};
use proptest::prelude::*;

use super::testing::{Section, bzimage, elf64, gzip, multiboot_flat, pe, pvh_note, ram};
use super::*;

const MIB: u64 = 1 << 20;

fn file(name: &str, data: Vec<u8>) -> BootFile {
    BootFile { name: name.into(), data }
}

fn request(kernel: &BootFile) -> BootRequest<'_> {
    BootRequest {
        kernel,
        initrd: None,
        modules: &[],
        command_line: Some("console=ttyS0"),
        acpi: &[],
        rsdp: L1Gpa(0),
        entry: BootEntry::Auto,
    }
}

fn bytes(ram: &L1Ram, at: u64, len: usize) -> Vec<u8> {
    let mut b = vec![0; len];
    ram.read(L1Gpa(at), &mut b).unwrap();
    b
}

fn u32_in(ram: &L1Ram, at: u64) -> u32 {
    u32::from_le_bytes(bytes(ram, at, 4).try_into().unwrap())
}

fn u64_in(ram: &L1Ram, at: u64) -> u64 {
    u64::from_le_bytes(bytes(ram, at, 8).try_into().unwrap())
}

fn text(ram: &L1Ram, at: u64) -> String {
    let b = bytes(ram, at, 256);
    String::from_utf8(b.split(|c| *c == 0).next().unwrap().to_vec()).unwrap()
}

/// A vmlinux with code at 16 MiB that is 0x3000 bytes longer in memory than in the file.
fn vmlinux() -> Vec<u8> {
    let code =
        Section { paddr: 16 * MIB, vaddr: 0xffff_ffff_8100_0000, data: vec![0xc3; 0x1000], mem: 0x4000 };
    elf64(16 * MIB + 0x10, &[code], Some(&pvh_note(16 * MIB as u32 + 0x20)))
}

#[test]
fn linux_is_unpacked_and_entered_at_its_64_bit_entry() {
    let ram = ram(64 * MIB);
    // RAM of an earlier boot.
    ram.fill(L1Gpa(16 * MIB), 0xee, 0x4000).unwrap();
    let kernel = file("k", bzimage(&gzip(&vmlinux())));
    let initrd = file("i", b"0707initrd".to_vec());
    let acpi = [(L1Gpa(0xe_0000), b"RSD PTR ".to_vec())];
    let r = BootRequest { initrd: Some(&initrd), acpi: &acpi, rsdp: L1Gpa(0xe_0000), ..request(&kernel) };
    let loaded = load(&ram, &r).unwrap();

    assert_eq!(loaded.protocol, BootProtocol::Linux64);
    assert_eq!(loaded.kernel_version.as_deref(), Some("6.9.0-test"));
    assert_eq!(loaded.state.rip, 16 * MIB + 0x10);
    assert_eq!(bytes(&ram, 16 * MIB, 0x1000), [0xc3; 0x1000]);
    assert_eq!(bytes(&ram, 16 * MIB + 0x1000, 0x3000), [0; 0x3000], "the rest of the segment is zero");
    assert_eq!(bytes(&ram, 0xe_0000, 8), b"RSD PTR ");

    // boot_params, by offsets of Documentation/arch/x86/zero-page.rst and boot.rst.
    let params = loaded.state.gprs.rsi;
    assert_eq!(u64_in(&ram, params + 0x70), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(bytes(&ram, params + 0x1ef, 1), [0], "sentinel");
    assert_eq!(bytes(&ram, params + 0x202, 4), b"HdrS");
    assert_eq!(bytes(&ram, params + 0x210, 2), [0xff, 1], "type_of_loader, loadflags");
    let (image, size) = (u32_in(&ram, params + 0x218), u32_in(&ram, params + 0x21c));
    assert_eq!(bytes(&ram, image.into(), size as usize), b"0707initrd");
    assert_eq!(text(&ram, u32_in(&ram, params + 0x228).into()), "console=ttyS0");
    assert_eq!(bytes(&ram, params + 0x1e8, 1), [4], "e820_entries");
    let e820: Vec<_> = (0..4)
        .map(|i| params + 0x2d0 + 20 * i)
        .map(|at| (u64_in(&ram, at), u64_in(&ram, at + 8), u32_in(&ram, at + 16)))
        .collect();
    let ecam = (0xe000_0000, 256 * MIB, 2);
    assert_eq!(e820, [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (MIB, 63 * MIB, 1), ecam]);
}

#[test]
fn the_64_bit_entry_state_is_what_the_protocol_says() {
    let ram = ram(64 * MIB);
    let kernel = file("k", bzimage(&gzip(&vmlinux())));
    let s = load(&ram, &request(&kernel)).unwrap().state;
    // "64-bit BOOT PROTOCOL": paging on, identity-mapped, __BOOT_CS 0x10 and __BOOT_DS 0x18
    // flat, interrupts off.
    assert_eq!(s.mode, BootMode::Long64);
    assert_eq!((s.cs.selector, s.ds.selector, s.es.selector, s.ss.selector), (0x10, 0x18, 0x18, 0x18));
    assert_eq!(s.rflags, 2);
    assert_eq!(s.cr0 & 0x8000_0001, 0x8000_0001);
    assert_eq!((s.cr4, s.efer), (1 << 5, 1 << 8 | 1 << 10));
    // SDM Vol. 3A figure 3-8: L set and D clear for 64-bit code; table 3-1: types 11 and 3.
    let code = u64_in(&ram, s.gdtr.base + 0x10);
    assert_eq!((code >> 40 & 0xff, code >> 53 & 0b11), (0x9b, 0b01));
    assert_eq!(u64_in(&ram, s.gdtr.base + 0x18) >> 40 & 0xff, 0x93);
    assert!(s.gdtr.limit >= 0x1f);
    // Walk the tables as SDM Vol. 3A §4.5 has it, for an address in each GiB.
    for address in [0, 16 * MIB + 0x10, 0x7fff_ffff, 0xbfff_0000, 0xffff_ffff_u64] {
        let pml4e = u64_in(&ram, s.cr3 + 8 * (address >> 39 & 0x1ff));
        let pdpte = u64_in(&ram, (pml4e & !0xfff) + 8 * (address >> 30 & 0x1ff));
        let pde = u64_in(&ram, (pdpte & !0xfff) + 8 * (address >> 21 & 0x1ff));
        assert_eq!((pml4e & 3, pdpte & 0x83, pde & 0x83), (3, 3, 0x83), "{address:#x}");
        assert_eq!((pde & !0x1f_ffff) | (address & 0x1f_ffff), address);
    }
}

#[test]
fn other_entries_of_a_bzimage() {
    let kernel = file("k", bzimage(&gzip(&vmlinux())));
    let ram1 = ram(64 * MIB);
    let pvh = load(&ram1, &BootRequest { entry: BootEntry::Pvh, ..request(&kernel) }).unwrap();
    assert_eq!((pvh.protocol, pvh.state.rip), (BootProtocol::Pvh, 16 * MIB + 0x20));
    let packed =
        load(&ram(64 * MIB), &BootRequest { entry: BootEntry::Decompressor, ..request(&kernel) }).unwrap();
    assert_eq!((packed.protocol, packed.state.rip), (BootProtocol::Linux64, 16 * MIB + 0x200));

    // A payload that can't be unpacked here is left to the kernel.
    let lzo = file("k", bzimage(b"\x89LZO\0\x0d\x0a\x1a\x0a"));
    assert_eq!(load(&ram(64 * MIB), &request(&lzo)).unwrap().state.rip, 16 * MIB + 0x200);

    // Without a 64-bit entry: the 32-bit one, flat and unpaged.
    let mut old = bzimage(b"\x89LZO\0\x0d\x0a\x1a\x0a");
    old[0x236] = 0;
    let loaded = load(&ram(64 * MIB), &request(&file("k", old))).unwrap();
    assert_eq!((loaded.protocol, loaded.state.mode), (BootProtocol::Linux32, BootMode::Protected32));
    assert_eq!((loaded.state.rip, loaded.state.cr0 >> 31, loaded.state.cs.selector), (16 * MIB, 0, 0x10));
}

#[test]
fn every_compression_of_the_payload() {
    let vmlinux = vmlinux();
    let size = (vmlinux.len() as u32).to_le_bytes();
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), {
        let mut o = lzma_rust2::XzOptions::default();
        o.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
        o
    })
    .unwrap();
    std::io::Write::write_all(&mut xz, &vmlinux).unwrap();
    let xz = xz.finish().unwrap();
    let block = lz4_flex::block::compress(&vmlinux);
    let lz4 = [&[0x02, 0x21, 0x4c, 0x18], &(block.len() as u32).to_le_bytes()[..], &block].concat();
    let zstd = ruzstd::encoding::compress_to_vec(&vmlinux[..], ruzstd::encoding::CompressionLevel::Fastest);
    for (name, packed) in [("xz", xz), ("lz4", lz4), ("zstd", zstd)] {
        // The kernel's build appends the size.
        let kernel = file(name, bzimage(&[&packed[..], &size].concat()));
        let loaded = load(&ram(64 * MIB), &request(&kernel)).unwrap();
        assert_eq!(loaded.state.rip, 16 * MIB + 0x10, "{name}");
        let cut = file(name, bzimage(&[&packed[..packed.len() / 2], &size].concat()));
        let e = load(&ram(64 * MIB), &request(&cut)).unwrap_err();
        assert!(
            matches!(&e, BootError::Decompress { format, offset: 0x404, .. } if *format == name)
                || matches!(&e, BootError::Truncated { .. }),
            "{e}"
        );
    }
}

#[test]
fn the_initrd_stays_below_the_kernels_limit() {
    let ram = ram(1 << 30);
    let mut image = bzimage(&gzip(&vmlinux()));
    image[0x22c..0x230].copy_from_slice(&0x1fff_ffff_u32.to_le_bytes());
    let kernel = file("k", image);
    let initrd = file("i", vec![7; 5000]);
    let s = load(&ram, &BootRequest { initrd: Some(&initrd), ..request(&kernel) }).unwrap().state;
    assert_eq!(u32_in(&ram, s.gprs.rsi + 0x218), 0x1fff_e000);
}

#[test]
fn too_little_memory() {
    let kernel = file("k", bzimage(&gzip(&vmlinux())));
    let e = load(&ram(8 * MIB), &request(&kernel)).unwrap_err();
    assert!(matches!(e, BootError::NoRoom { ram_mib: 8, .. }), "{e}");
    assert!(e.to_string().contains("--memory"), "{e}");
    let initrd = file("big", vec![0; 50 * MIB as usize]);
    let e = load(&ram(64 * MIB), &BootRequest { initrd: Some(&initrd), ..request(&kernel) }).unwrap_err();
    assert!(matches!(&e, BootError::NoRoom { file, .. } if file == "big"), "{e}");
    // One that fits, but not twice, which it has to while the kernel unpacks it.
    let initrd = file("big", vec![0; 35 * MIB as usize]);
    let e = load(&ram(64 * MIB), &BootRequest { initrd: Some(&initrd), ..request(&kernel) }).unwrap_err();
    assert!(matches!(&e, BootError::TooLittleRam { initrd_mib: 35, ram_mib: 64, .. }), "{e}");
    assert!(load(&ram(80 * MIB), &BootRequest { initrd: Some(&initrd), ..request(&kernel) }).is_ok());
    // A small file that unpacks to more than RAM.
    let bomb = file("bomb", bzimage(&gzip(&vec![0; 9 * MIB as usize])));
    let e = load(&ram(8 * MIB), &request(&bomb)).unwrap_err();
    assert!(matches!(e, BootError::PayloadTooBig { ram_mib: 8, .. }), "{e}");
}

#[test]
fn setup_header_errors() {
    let good = bzimage(&gzip(&vmlinux()));
    let with = |at: usize, v: &[u8]| {
        let mut k = good.clone();
        k[at..at + v.len()].copy_from_slice(v);
        load(&ram(64 * MIB), &request(&file("k", k))).unwrap_err()
    };
    assert!(matches!(with(0x206, &[5, 2]), BootError::ProtocolTooOld { major: 2, minor: 5, .. }));
    assert!(matches!(with(0x201, &[2]), BootError::BadField { offset: 0x201, .. }));
    assert!(matches!(with(0x211, &[0]), BootError::Unsupported { offset: 0x211, .. }));
    assert!(matches!(with(0x230, &[3, 0, 0, 0]), BootError::BadField { offset: 0x230, .. }));
    assert!(matches!(with(0x24c, &[0xff; 4]), BootError::Truncated { .. }));
    assert!(matches!(with(0x1f1, &[200]), BootError::Truncated { .. }));
    assert!(matches!(with(0x238, &[5, 0, 0, 0]), BootError::CommandLineTooLong { len: 13, max: 5, .. }));
    // The code's size in units of 16 bytes.
    let units = (good.len() - 0x400).div_ceil(16) as u32 + 1;
    assert!(matches!(with(0x1f4, &units.to_le_bytes()), BootError::Truncated { offset: 0x400, .. }));
    let kernel = file("k", good.clone());
    let nul = BootRequest { command_line: Some("a\0b"), ..request(&kernel) };
    assert!(matches!(load(&ram(64 * MIB), &nul), Err(BootError::CommandLineNul { offset: 1, .. })));
    for cut in [0x202, 0x206, 0x220, 0x260, 0x300, good.len() - 1] {
        let k = file("k", good[..cut].to_vec());
        assert!(load(&ram(64 * MIB), &request(&k)).is_err(), "{cut:#x}");
    }
}

#[test]
fn pvh_start_info() {
    let ram = ram(64 * MIB);
    let kernel = file("k", vmlinux());
    let initrd = file("i", b"first".to_vec());
    let modules = [BootModule { file: file("m", b"second".to_vec()), command_line: "args".into() }];
    let r =
        BootRequest { initrd: Some(&initrd), modules: &modules, rsdp: L1Gpa(0xe_0000), ..request(&kernel) };
    let s = load(&ram, &r).unwrap().state;
    assert_eq!((s.mode, s.rip, s.cr4, s.efer), (BootMode::Protected32, 16 * MIB + 0x20, 0, 0));
    assert_eq!(s.cr0 >> 31, 0);
    // struct hvm_start_info and hvm_modlist_entry of Xen's start_info.h.
    let info = s.gprs.rbx;
    assert_eq!((u32_in(&ram, info), u32_in(&ram, info + 4)), (0x336e_c578, 1));
    assert_eq!(u32_in(&ram, info + 12), 2, "nr_modules");
    let list = u64_in(&ram, info + 16);
    assert_eq!(text(&ram, u64_in(&ram, info + 24)), "console=ttyS0");
    assert_eq!(u64_in(&ram, info + 32), 0xe_0000, "rsdp_paddr");
    let (map, entries) = (u64_in(&ram, info + 40), u32_in(&ram, info + 48));
    assert_eq!((entries, u64_in(&ram, map + 8), u32_in(&ram, map + 16)), (4, 0x9_fc00, 1));
    assert_eq!(bytes(&ram, u64_in(&ram, list), 5), b"first");
    assert_eq!((u64_in(&ram, list + 8), u64_in(&ram, list + 16)), (5, 0));
    assert_eq!(bytes(&ram, u64_in(&ram, list + 32), 6), b"second");
    assert_eq!(text(&ram, u64_in(&ram, list + 48)), "args");
}

#[test]
fn multiboot_information() {
    let ram = ram(64 * MIB);
    // Flat: loaded at 1 MiB, entered at its byte 0x20, with 0x100 bytes of bss.
    let image = multiboot_flat(0, [0x10_0000, 0x10_0000, 0, 0x10_0140, 0x10_0020]);
    let kernel = file("dir/kernel.bin", image.clone());
    let modules = [
        BootModule { file: file("mods/a", b"first".to_vec()), command_line: "x=1".into() },
        BootModule { file: file("b", b"second".to_vec()), command_line: String::new() },
    ];
    let loaded = load(&ram, &BootRequest { modules: &modules, ..request(&kernel) }).unwrap();
    let s = loaded.state;
    assert_eq!((loaded.protocol, s.rip, s.gprs.rax), (BootProtocol::Multiboot, 0x10_0020, 0x2bad_b002));
    assert_eq!(bytes(&ram, 0x10_0000, 0x40), image);
    // Multiboot Specification §3.3.
    let info = s.gprs.rbx;
    assert_eq!(u32_in(&ram, info) & 0b1001101, 0b1001101);
    assert_eq!((u32_in(&ram, info + 4), u32_in(&ram, info + 8)), (639, 63 << 10), "mem_lower, mem_upper");
    assert_eq!(text(&ram, u32_in(&ram, info + 16).into()), "kernel.bin console=ttyS0");
    assert_eq!(u32_in(&ram, info + 20), 2);
    let list = u64::from(u32_in(&ram, info + 24));
    let (start, end) = (u32_in(&ram, list), u32_in(&ram, list + 4));
    assert_eq!((start % 4096, bytes(&ram, start.into(), (end - start) as usize)), (0, b"first".to_vec()));
    assert_eq!(text(&ram, u32_in(&ram, list + 8).into()), "a x=1");
    assert_eq!(text(&ram, u32_in(&ram, list + 24).into()), "b");
    let (len, map) = (u32_in(&ram, info + 44), u64::from(u32_in(&ram, info + 48)));
    assert_eq!((len, u32_in(&ram, map), u64_in(&ram, map + 12)), (4 * 24, 20, 0x9_fc00));
    assert_eq!(text(&ram, u32_in(&ram, info + 64).into()), "nestvmm");
}

#[test]
fn the_bios_data_area_says_where_conventional_memory_ends() {
    let ram = ram(64 * MIB);
    ram.fill(L1Gpa(0), 0xee, 0x1000).unwrap();
    load(&ram, &request(&file("k", vmlinux()))).unwrap();
    // IBM PS/2 BIOS Technical Reference, "BIOS Data Area".
    assert_eq!(u32_in(&ram, 0x400) & 0xffff, 0x3f8);
    assert_eq!(u32_in(&ram, 0x40e) & 0xffff, 0x9fc0);
    assert_eq!(u32_in(&ram, 0x413) & 0xffff, 639);
    assert_eq!(bytes(&ram, 0x9_fc00, 1), [1]);
    assert_eq!(bytes(&ram, 0, 0x400), [0; 0x400]);
}

#[test]
fn multiboot_header_errors() {
    let run = |image: Vec<u8>| load(&ram(8 * MIB), &request(&file("k", image)));
    let addresses = [0x10_0000, 0x10_0000, 0, 0, 0x10_0020];
    let with = |i: usize, v: u32| {
        let mut a = addresses;
        a[i] = v;
        run(multiboot_flat(0, a))
    };
    assert!(run(multiboot_flat(0, addresses)).is_ok());
    assert!(matches!(with(1, 0x10_0001), Err(BootError::BadField { what: "load_addr", .. })));
    assert!(matches!(with(1, 0x0f_0000), Err(BootError::BadField { what: "load_addr", .. })));
    assert!(matches!(with(2, 0x20_0000), Err(BootError::Truncated { .. })));
    assert!(matches!(with(2, 1), Err(BootError::BadField { what: "load_end_addr", .. })));
    assert!(matches!(with(3, 0x10_0001), Err(BootError::BadField { what: "bss_end_addr", .. })));
    assert!(matches!(with(3, u32::MAX), Err(BootError::NoRoom { .. })));
    assert!(matches!(with(4, 0x10_0040), Err(BootError::BadField { what: "entry_addr", .. })));
    assert!(matches!(run(multiboot_flat(1 << 3, addresses)), Err(BootError::Unsupported { .. })));
    // A video mode is only a wish.
    assert_eq!(run(multiboot_flat(1 << 2, addresses)).unwrap().notices.len(), 1);
    // In the ROM area, over the place for the BIOS data area.
    let low = [0x500, 0x500, 0, 0, 0x520];
    assert!(matches!(run(multiboot_flat(0, low)), Err(BootError::Overlap { .. })));
}

#[test]
fn unified_kernel_images() {
    let kernel = bzimage(&gzip(&vmlinux()));
    let uki = pe(&[(".linux", &kernel), (".initrd", b"own"), (".cmdline", b"quiet\n\0")]);
    let kernel = file("uki", uki);
    let other = file("i", b"given".to_vec());
    for (initrd, line, want) in
        [(None, None, ("own", "quiet")), (Some(&other), Some("loud"), ("given", "loud"))]
    {
        let ram = ram(64 * MIB);
        let r = BootRequest { initrd, command_line: line, ..request(&kernel) };
        let params = load(&ram, &r).unwrap().state.gprs.rsi;
        let (at, len) = (u32_in(&ram, params + 0x218), u32_in(&ram, params + 0x21c));
        assert_eq!(bytes(&ram, at.into(), len as usize), want.0.as_bytes());
        assert_eq!(text(&ram, u32_in(&ram, params + 0x228).into()), want.1);
    }
    let program = file("p", pe(&[(".text", b"x")]));
    assert!(matches!(load(&ram(64 * MIB), &request(&program)), Err(BootError::NotAKernel { .. })));
}

#[test]
fn kernels_packed_as_a_whole() {
    let kernel = file("xen.gz", gzip(&multiboot_flat(0, [0x10_0000, 0x10_0000, 0, 0, 0x10_0020])));
    assert_eq!(load(&ram(8 * MIB), &request(&kernel)).unwrap().protocol, BootProtocol::Multiboot);
    let cut = file("cut", kernel.data[..kernel.data.len() / 2].to_vec());
    let e = load(&ram(8 * MIB), &request(&cut)).unwrap_err();
    assert!(matches!(e, BootError::Decompress { offset: 0, .. }), "{e}");
    let bomb = file("bomb", gzip(&vec![0; 9 * MIB as usize]));
    let e = load(&ram(8 * MIB), &request(&bomb)).unwrap_err();
    assert!(matches!(e, BootError::PayloadTooBig { .. }), "{e}");
}

#[test]
fn files_that_are_no_kernels() {
    let plain = elf64(MIB, &[Section { paddr: MIB, vaddr: MIB, data: vec![0; 16], mem: 16 }], None);
    for (data, found) in [
        (Vec::new(), "empty"),
        (b"hello".to_vec(), "text"),
        (b"070701".to_vec(), "cpio"),
        (gzip(b"\xff\xfe"), "unknown"),
        (gzip(&gzip(b"hello")), "compressed"),
        (vec![0xff; 600], "unknown"),
        (plain, "neither a PVH note nor a multiboot header"),
    ] {
        match load(&ram(8 * MIB), &request(&file("f", data))) {
            Err(e @ BootError::NotAKernel { .. }) => assert!(e.to_string().contains(found), "{e}"),
            other => panic!("{found}: {other:?}"),
        }
    }
}

#[test]
fn segments_can_not_overwrite_each_other_or_the_tables() {
    let at = |paddr, mem| Section { paddr, vaddr: paddr, data: vec![1; 8], mem };
    for sections in [
        vec![at(MIB, 0x1000), at(MIB + 0xfff, 0x10)],
        vec![at(0xa_0000, 0x10)],
        vec![at(u64::MAX - 4, 8)],
        vec![at(MIB, u64::MAX)],
        vec![at(2 * MIB, 8)],
    ] {
        let kernel = file("k", elf64(MIB, &sections, Some(&pvh_note(MIB as u32))));
        let acpi = [(L1Gpa(2 * MIB), vec![0; 64])];
        let e = load(&ram(8 * MIB), &BootRequest { acpi: &acpi, ..request(&kernel) }).unwrap_err();
        assert!(matches!(e, BootError::Overlap { .. } | BootError::NoRoom { .. }), "{e}");
    }
    let outside = file("k", elf64(MIB, &[at(MIB, 8)], Some(&pvh_note(MIB as u32 + 8))));
    assert!(matches!(load(&ram(8 * MIB), &request(&outside)), Err(BootError::Malformed { .. })));
}

/// A valid file of each format.
fn corpus() -> Vec<Vec<u8>> {
    let kernel = bzimage(&gzip(&vmlinux()));
    vec![
        pe(&[(".linux", &kernel), (".initrd", b"own"), (".cmdline", b"quiet")]),
        kernel,
        vmlinux(),
        multiboot_flat(0, [0x10_0000, 0x10_0000, 0, 0x10_0140, 0x10_0020]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever a damaged file says, loading ends, and either entry is in RAM or there is an
    /// error that names the file.
    #[test]
    fn damaged_files_never_panic(
        which in 0..4_usize,
        // Most of what is parsed stands in the first KiB.
        changes in prop::collection::vec((prop_oneof![3 => 0..0x400_usize, 1 => 0..0x4000_usize], any::<u8>()), 0..8),
        cut in prop::option::of(0..0x4000_usize),
        fill in prop::option::of((0..0x400_usize, prop::sample::select(vec![0_u8, 0x7f, 0x80, 0xff]))),
    ) {
        let mut data = corpus().swap_remove(which);
        for (at, value) in changes {
            if let Some(b) = data.get_mut(at) {
                *b = value;
            }
        }
        if let Some((at, value)) = fill {
            for b in data.iter_mut().skip(at).take(4) {
                *b = value;
            }
        }
        data.truncate(cut.unwrap_or(usize::MAX));
        let kernel = file("damaged", data);
        match load(&ram(32 * MIB), &request(&kernel)) {
            Ok(loaded) => prop_assert!(loaded.state.rip < 32 * MIB),
            Err(e) => prop_assert!(e.to_string().contains("damaged"), "{}", e),
        }
    }
}
