//! Fault reasons of legacy mode (appendix A, tables of non-recoverable fault reason encodings).

use core::fmt;

/// Why a request was blocked: FRCD_REG.FR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FaultReason {
    /// The present field of the root entry is clear.
    RootNotPresent = 0x01,
    /// The present field of the context entry is clear.
    ContextNotPresent = 0x02,
    /// Invalid programming of a context entry: a translation type or address width that is reserved or
    /// not supported.
    ContextInvalid = 0x03,
    /// The address is above what the smaller of MGAW and the context entry's address width allows.
    AddressTooHigh = 0x04,
    /// A write without write permission.
    WriteDenied = 0x05,
    /// A read without read permission.
    ReadDenied = 0x06,
    /// A paging entry could not be read.
    PagingAccess = 0x07,
    /// A root entry could not be read.
    RootAccess = 0x08,
    /// A context entry could not be read.
    ContextAccess = 0x09,
    /// A reserved field of a present root entry is not 0.
    RootReserved = 0x0a,
    /// A reserved field of a present context entry is not 0.
    ContextReserved = 0x0b,
    /// A reserved field of a paging entry that allows reads or writes is not 0.
    PagingReserved = 0x0c,
    /// The context entry does not allow translation requests and translated requests.
    TranslatedBlocked = 0x0d,
    /// The translation leads to the range of interrupt requests.
    InterruptRange = 0x0e,
    /// A reserved field of a remappable interrupt request is not 0.
    RequestReserved = 0x20,
    /// The interrupt index is beyond the table.
    IndexTooHigh = 0x21,
    /// The present field of the IRTE is clear.
    EntryNotPresent = 0x22,
    /// The IRTE could not be read.
    EntryAccess = 0x23,
    /// A reserved field of a present IRTE is not 0.
    EntryReserved = 0x24,
    /// A compatibility format request is blocked.
    CompatibilityBlocked = 0x25,
    /// The request's source ID is not the one that the IRTE names.
    SourceDenied = 0x26,
    /// The posted-interrupt descriptor could not be accessed.
    DescriptorAccess = 0x27,
    /// A reserved field of the posted-interrupt descriptor is not 0.
    DescriptorReserved = 0x28,
    /// RTADDR_REG.TTM asks for a mode that is not offered.
    TableMode = 0x31,
}

impl FaultReason {
    /// The encoding.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether FPD of the context entry or IRTE keeps it from being recorded ("qualified" in appendix A). The others
    /// come from structures above that field.
    pub const fn is_qualified(self) -> bool {
        !matches!(
            self,
            Self::RootNotPresent
                | Self::RootAccess
                | Self::ContextAccess
                | Self::RootReserved
                | Self::RequestReserved
                | Self::IndexTooHigh
                | Self::EntryAccess
                | Self::CompatibilityBlocked
                | Self::TableMode
        )
    }
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::RootNotPresent => "root entry not present",
            Self::ContextNotPresent => "context entry not present",
            Self::ContextInvalid => "invalid context entry",
            Self::AddressTooHigh => "address beyond the domain's width",
            Self::WriteDenied => "no write permission",
            Self::ReadDenied => "no read permission",
            Self::PagingAccess => "paging entry outside memory",
            Self::RootAccess => "root table outside memory",
            Self::ContextAccess => "context table outside memory",
            Self::RootReserved => "reserved bits in the root entry",
            Self::ContextReserved => "reserved bits in the context entry",
            Self::PagingReserved => "reserved bits in a paging entry",
            Self::TranslatedBlocked => "translation or translated request",
            Self::InterruptRange => "translation to the interrupt range",
            Self::RequestReserved => "reserved bits in the interrupt request",
            Self::IndexTooHigh => "interrupt index beyond the table",
            Self::EntryNotPresent => "interrupt remapping entry not present",
            Self::EntryAccess => "interrupt remapping table outside memory",
            Self::EntryReserved => "reserved bits in the interrupt remapping entry",
            Self::CompatibilityBlocked => "compatibility format interrupt",
            Self::SourceDenied => "source of the interrupt is not the entry's",
            Self::DescriptorAccess => "posted-interrupt descriptor outside memory",
            Self::DescriptorReserved => "reserved bits in the posted-interrupt descriptor",
            Self::TableMode => "translation table mode not offered",
        };
        write!(f, "{text} ({:#04x})", self.code())
    }
}
