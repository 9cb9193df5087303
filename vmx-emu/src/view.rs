//! VMCS01, VMCS12 and VMCS02 side by side, with the origin of each control bit: for a failed
//! entry, or when the user asks.

use std::fmt::{self, Write as _};

use engine::EngineVmcs;
use x86_spec::segment::seg;

use crate::capabilities::{self, Control};
use crate::fields::Field;
use crate::merge::provenance::{ControlOrigins, Origins};
use crate::vmcs12::Vmcs12;

/// The three VMCSs, to be printed.
#[derive(Clone, Copy, Debug)]
pub struct ThreeWay<'a> {
    /// How L0 runs L1.
    pub vmcs01: &'a EngineVmcs,
    /// How L1 wants L2 to run; `None` if it has no current VMCS.
    pub vmcs12: Option<&'a Vmcs12>,
    /// How L0 runs L2, or ran it last; `None` if it never did.
    pub vmcs02: Option<&'a EngineVmcs>,
    /// Origins of VMCS02's control bits; `None` if no merge came about.
    pub origins: Option<&'a ControlOrigins>,
}

impl fmt::Display for ThreeWay<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.control_bits(f)?;
        self.rows(f, "Controls", &self.control_rows())?;
        self.rows(f, "Guest state", &self.guest_rows())?;
        self.segments(f)
    }
}

/// A row: name and the values of VMCS01 and VMCS02.
type Row = (Field, u64, Option<u64>);

/// A value, or that there is none.
fn cell(value: Option<u64>) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:#x}"))
}

impl ThreeWay<'_> {
    /// The bits of the five control fields that are set anywhere.
    fn control_bits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let a = &self.vmcs01.controls;
        let c = self.vmcs02.map(|v| &v.controls);
        let none = ControlOrigins::default();
        let o = self.origins.unwrap_or(&none);
        type Row<'a> = (Field, &'a [Control], u32, Option<u32>, &'a Origins);
        let fields: [Row<'_>; 5] = [
            (Field::PinControls, capabilities::PIN, a.pin.bits(), c.map(|c| c.pin.bits()), &o.pin),
            (
                Field::PrimaryControls,
                capabilities::PRIMARY,
                a.primary.bits(),
                c.map(|c| c.primary.bits()),
                &o.primary,
            ),
            (
                Field::SecondaryControls,
                capabilities::SECONDARY,
                a.secondary.bits(),
                c.map(|c| c.secondary.bits()),
                &o.secondary,
            ),
            (Field::ExitControls, capabilities::EXIT, a.exit.bits(), c.map(|c| c.exit.bits()), &o.exit),
            (Field::EntryControls, capabilities::ENTRY, a.entry.bits(), c.map(|c| c.entry.bits()), &o.entry),
        ];
        for (field, controls, v01, v02, origins) in fields {
            let v12 = self.vmcs12.map(|v| v.get32(field));
            let any = v01 | v12.unwrap_or(0) | v02.unwrap_or(0);
            writeln!(
                f,
                "{:<42} {:>10} {:>10} {:>10}  origin",
                field.sdm_name(),
                "VMCS01",
                "VMCS12",
                "VMCS02"
            )?;
            for control in controls.iter().filter(|c| any & c.mask() != 0) {
                let bit = |v: Option<u32>| match v {
                    None => '-',
                    Some(v) => char::from(b'0' + u8::from(v & control.mask() != 0)),
                };
                let (v01, v12, v02) = (bit(Some(v01)), bit(v12), bit(v02));
                write!(f, "  {:<40} {v01:>10} {v12:>10} {v02:>10}", control.name)?;
                if self.origins.is_some() {
                    write!(f, "  {}", origins.of(control.bit))?;
                }
                f.write_char('\n')?;
            }
        }
        Ok(())
    }

    /// One line for each field; VMCS12's value is looked up.
    fn rows(&self, f: &mut fmt::Formatter<'_>, title: &str, rows: &[Row]) -> fmt::Result {
        writeln!(f, "{title:<42} {:>18} {:>18} {:>18}", "VMCS01", "VMCS12", "VMCS02")?;
        for (field, v01, v02) in rows {
            let v12 = self.vmcs12.map(|v| v.get(*field));
            let differ = matches!((v12, v02), (Some(a), Some(b)) if a != *b);
            let mark = if differ { '*' } else { ' ' };
            let (v01, v12, v02) = (cell(Some(*v01)), cell(v12), cell(*v02));
            writeln!(f, " {mark}{:<40} {v01:>18} {v12:>18} {v02:>18}", field.sdm_name())?;
        }
        Ok(())
    }

    fn control_rows(&self) -> Vec<Row> {
        let a = &self.vmcs01.controls;
        let c = self.vmcs02.map(|v| &v.controls);
        vec![
            (Field::ExceptionBitmap, a.exception_bitmap.into(), c.map(|c| u64::from(c.exception_bitmap))),
            (Field::PageFaultErrorCodeMask, a.pfec_mask.into(), c.map(|c| u64::from(c.pfec_mask))),
            (Field::PageFaultErrorCodeMatch, a.pfec_match.into(), c.map(|c| u64::from(c.pfec_match))),
            (Field::IoBitmapA, a.io_bitmap_a.0, c.map(|c| c.io_bitmap_a.0)),
            (Field::IoBitmapB, a.io_bitmap_b.0, c.map(|c| c.io_bitmap_b.0)),
            (Field::MsrBitmap, a.msr_bitmap.0, c.map(|c| c.msr_bitmap.0)),
            (Field::TscOffset, a.tsc_offset, c.map(|c| c.tsc_offset)),
            (Field::TscMultiplier, a.tsc_multiplier, c.map(|c| c.tsc_multiplier)),
            (Field::Cr0Mask, a.cr0_mask, c.map(|c| c.cr0_mask)),
            (Field::Cr0Shadow, a.cr0_shadow, c.map(|c| c.cr0_shadow)),
            (Field::Cr4Mask, a.cr4_mask, c.map(|c| c.cr4_mask)),
            (Field::Cr4Shadow, a.cr4_shadow, c.map(|c| c.cr4_shadow)),
            (Field::Cr3TargetCount, a.cr3_target_count.into(), c.map(|c| u64::from(c.cr3_target_count))),
            (Field::ApicAccessAddress, a.apic_access.0, c.map(|c| c.apic_access.0)),
            (Field::VirtualApicAddress, a.virtual_apic.0, c.map(|c| c.virtual_apic.0)),
            (Field::TprThreshold, a.tpr_threshold.into(), c.map(|c| u64::from(c.tpr_threshold))),
            (Field::PostedInterruptVector, a.posted_vector.into(), c.map(|c| u64::from(c.posted_vector))),
            (Field::PostedInterruptDescriptor, a.posted_descriptor.0, c.map(|c| c.posted_descriptor.0)),
            (Field::Eptp, a.eptp, c.map(|c| c.eptp)),
            (Field::Vpid, a.vpid.into(), c.map(|c| u64::from(c.vpid))),
            (Field::VmFunctionControls, a.vm_functions, c.map(|c| c.vm_functions)),
            (Field::XssExitBitmap, a.xss_exit_bitmap, c.map(|c| c.xss_exit_bitmap)),
            (
                Field::EntryInterruptionInfo,
                a.entry_interruption.0.into(),
                c.map(|c| u64::from(c.entry_interruption.0)),
            ),
            (Field::EntryErrorCode, a.entry_error_code.into(), c.map(|c| u64::from(c.entry_error_code))),
        ]
    }

    fn guest_rows(&self) -> Vec<Row> {
        let a = &self.vmcs01.guest;
        let c = self.vmcs02.map(|v| &v.guest);
        vec![
            (Field::GuestRip, a.rip, c.map(|c| c.rip)),
            (Field::GuestRsp, a.rsp, c.map(|c| c.rsp)),
            (Field::GuestRflags, a.rflags, c.map(|c| c.rflags)),
            (Field::GuestCr0, a.cr0, c.map(|c| c.cr0)),
            (Field::GuestCr3, a.cr3, c.map(|c| c.cr3)),
            (Field::GuestCr4, a.cr4, c.map(|c| c.cr4)),
            (Field::GuestDr7, a.dr7, c.map(|c| c.dr7)),
            (Field::GuestDebugctl, a.debugctl, c.map(|c| c.debugctl)),
            (Field::GuestEfer, a.efer, c.map(|c| c.efer)),
            (Field::GuestPat, a.pat, c.map(|c| c.pat)),
            (Field::GuestSysenterCs, a.sysenter_cs, c.map(|c| c.sysenter_cs)),
            (Field::GuestSysenterEsp, a.sysenter_esp, c.map(|c| c.sysenter_esp)),
            (Field::GuestSysenterEip, a.sysenter_eip, c.map(|c| c.sysenter_eip)),
            (Field::GuestActivity, a.activity as u64, c.map(|c| c.activity as u64)),
            (
                Field::GuestInterruptibility,
                a.interruptibility.into(),
                c.map(|c| u64::from(c.interruptibility)),
            ),
            (Field::GuestPendingDebug, a.pending_debug, c.map(|c| c.pending_debug)),
            (
                Field::GuestInterruptStatus,
                a.interrupt_status.into(),
                c.map(|c| u64::from(c.interrupt_status)),
            ),
            (Field::PreemptionTimer, a.preemption_timer.into(), c.map(|c| u64::from(c.preemption_timer))),
            (Field::GuestGdtrBase, a.gdtr.base, c.map(|c| c.gdtr.base)),
            (Field::GuestGdtrLimit, a.gdtr.limit.into(), c.map(|c| u64::from(c.gdtr.limit))),
            (Field::GuestIdtrBase, a.idtr.base, c.map(|c| c.idtr.base)),
            (Field::GuestIdtrLimit, a.idtr.limit.into(), c.map(|c| u64::from(c.idtr.limit))),
        ]
    }

    /// Segment registers as `selector base limit rights`.
    fn segments(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Segments (selector base limit access rights)")?;
        for (i, name) in seg::NAMES.iter().enumerate() {
            let sides = [
                ("01", self.vmcs01.guest.segments.get(i).copied()),
                ("12", self.vmcs12.map(|v| v.guest_segment(i))),
                ("02", self.vmcs02.and_then(|v| v.guest.segments.get(i).copied())),
            ];
            for (side, s) in sides {
                let Some(s) = s else { continue };
                let (selector, base, limit, rights) = (s.selector, s.base, s.limit, s.access.0);
                writeln!(
                    f,
                    "  {name:<4} VMCS{side} {selector:#06x} {base:#018x} {limit:#010x} {rights:#07x}"
                )?;
            }
        }
        Ok(())
    }
}
