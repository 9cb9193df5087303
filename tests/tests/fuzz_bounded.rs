//! Bounded runs of the fuzz targets' entry points with fixed seeds.

use tests::fuzz;

/// A fixed sequence of pseudo-random bytes (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.next() >> 56) as u8).collect()
    }
}

/// Random code from random states in every mode: L0's engine survives all of it. Opcodes of
/// the 0F map come often, because there the system instructions are.
#[test]
fn random_code_in_every_mode() {
    let mut r = Random(0x6e65_7374_766d_6d21);
    for round in 0..6000u32 {
        let mut data = r.bytes(400);
        data[1] = round as u8 & 15;
        for i in (160..data.len()).step_by(7) {
            if r.next() & 3 == 0 {
                data[i] = 0x0f;
            }
        }
        fuzz::cpu(&data);
    }
}

/// Random programs of VMX instructions in L1, many of which enter L2s.
#[test]
fn random_vmx_programs() {
    let mut r = Random(0x1234_5678);
    let mut with_l2 = 0;
    for round in 0..200u32 {
        let len = 20 + (r.next() % 400) as usize;
        let mut data = r.bytes(len);
        data[0] = round as u8;
        with_l2 += u32::from(fuzz::vmx(&data) > 0);
    }
    assert!(with_l2 > 20, "{with_l2} programs entered an L2");
}

/// The shortest program that enters L2: without a VMCS of its own making, VMLAUNCH of the prepared one.
#[test]
fn a_vmx_program_enters_l2() {
    for access in [0, 1] {
        assert!(fuzz::vmx(&[access, 1, 12, 14]) >= 2);
    }
}

/// Any accesses to any device.
#[test]
fn random_device_accesses() {
    let mut r = Random(0xdead_beef);
    for _ in 0..200 {
        let data = r.bytes(12 * 500);
        fuzz::devices(&data);
    }
}

/// Drivers that do anything to PCI devices. Enough of their requests are done that more than refusals is tried.
#[test]
fn random_pci_drivers() {
    let mut r = Random(0x6e76_6d65);
    let done: u64 = (0..150).map(|_| fuzz::pci(&r.bytes(6000))).sum();
    assert!(done > 500, "{done} requests were done");
}

/// Damaged kernels of every format: an error, never a panic.
#[test]
fn random_kernels() {
    let mut r = Random(1);
    let heads: [&[u8]; 4] =
        [b"\x7fELF\x02\x01\x01", b"MZ", &0x1bad_b002u32.to_le_bytes(), b"\x1f\x8b\x08\x00"];
    for round in 0..400usize {
        let len = 64 + (r.next() % 4096) as usize;
        let mut data = r.bytes(len);
        let head = heads[round % 4];
        data[..head.len()].copy_from_slice(head);
        if round % 2 == 0 && data.len() > 0x210 {
            data[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            data[0x202..0x206].copy_from_slice(b"HdrS");
        }
        fuzz::boot_loaders(&data);
        fuzz::image(&data);
    }
}

/// Exit traces, damaged or made of nothing.
#[test]
fn random_traces() {
    let mut r = Random(0x74_7261_6365);
    for _ in 0..300 {
        let len = (r.next() % 4096) as usize;
        fuzz::trace(&r.bytes(len));
    }
}

/// An IOMMU with tables, queues and commands of any contents.
#[test]
fn random_iommu_programs() {
    let mut r = Random(0x0056_5464);
    let mut passed = [0u64; 3];
    for _ in 0..3000 {
        let data = r.bytes(10 * 400);
        let got = fuzz::iommu(&data);
        passed.iter_mut().zip(got).for_each(|(sum, n)| *sum += n);
    }
    assert!(
        passed.iter().all(|n| *n > 100),
        "accesses, interrupts, descriptors that got through: {passed:?}"
    );
}
