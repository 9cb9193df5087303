//! Segment access rights in VMCS format (SDM Vol. 3C table 25-2) and descriptors.

/// Access rights of a segment, in the VMCS format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// Bit 4: code or data (else system).
    pub const S: u32 = 1 << 4;
    /// Bit 7: present.
    pub const P: u32 = 1 << 7;
    /// Bit 12: available to software.
    pub const AVL: u32 = 1 << 12;
    /// Bit 13: 64-bit code.
    pub const L: u32 = 1 << 13;
    /// Bit 14: default size / big.
    pub const DB: u32 = 1 << 14;
    /// Bit 15: granularity.
    pub const G: u32 = 1 << 15;
    /// Bit 16: unusable.
    pub const UNUSABLE: u32 = 1 << 16;

    /// From the high half of a descriptor (bits 8–15 and 20–23 of its second word).
    pub const fn from_descriptor_high(high: u32) -> Self {
        Self((high >> 8) & 0xf0ff)
    }
    /// Segment type, bits 3:0.
    pub const fn ty(self) -> u8 {
        (self.0 & 15) as u8
    }
    /// Descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }
    /// Code or data segment.
    pub const fn is_code_or_data(self) -> bool {
        self.0 & Self::S != 0
    }
    /// Code segment.
    pub const fn is_code(self) -> bool {
        self.0 & (Self::S | 8) == Self::S | 8
    }
    /// Present.
    pub const fn present(self) -> bool {
        self.0 & Self::P != 0
    }
    /// 64-bit code.
    pub const fn long(self) -> bool {
        self.0 & Self::L != 0
    }
    /// Default operand size 32 / big stack.
    pub const fn db(self) -> bool {
        self.0 & Self::DB != 0
    }
    /// Marked unusable.
    pub const fn unusable(self) -> bool {
        self.0 & Self::UNUSABLE != 0
    }
    /// Conforming code.
    pub const fn conforming(self) -> bool {
        self.0 & 4 != 0
    }
    /// Readable (code) or writable (data).
    pub const fn read_write(self) -> bool {
        self.0 & 2 != 0
    }
    /// Expand-down data.
    pub const fn expand_down(self) -> bool {
        self.0 & (Self::S | 8 | 4) == Self::S | 4
    }
}

/// Indices of the segment registers as instructions encode them (SDM Vol. 2A §2.1.5).
pub mod seg {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
    /// Names in encoding order, LDTR and TR after them.
    pub const NAMES: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
    /// LDTR, after the encodable ones.
    pub const LDTR: usize = 6;
    /// TR.
    pub const TR: usize = 7;
}
