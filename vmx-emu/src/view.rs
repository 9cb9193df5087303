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
    /// How L1 wants L2 to run.
    pub vmcs12: &'a Vmcs12,
    /// How L0 runs L2.
    pub vmcs02: &'a EngineVmcs,
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

/// A row: name and the values of VMCS01, VMCS12 and VMCS02.
type Row = (Field, u64, u64);

impl ThreeWay<'_> {
    /// The bits of the five control fields that are set anywhere.
    fn control_bits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (a, c) = (&self.vmcs01.controls, &self.vmcs02.controls);
        let none = ControlOrigins::default();
        let o = self.origins.unwrap_or(&none);
        let fields: [(Field, &[Control], u32, u32, &Origins); 5] = [
            (Field::PinControls, capabilities::PIN, a.pin.bits(), c.pin.bits(), &o.pin),
            (Field::PrimaryControls, capabilities::PRIMARY, a.primary.bits(), c.primary.bits(), &o.primary),
            (
                Field::SecondaryControls,
                capabilities::SECONDARY,
                a.secondary.bits(),
                c.secondary.bits(),
                &o.secondary,
            ),
            (Field::ExitControls, capabilities::EXIT, a.exit.bits(), c.exit.bits(), &o.exit),
            (Field::EntryControls, capabilities::ENTRY, a.entry.bits(), c.entry.bits(), &o.entry),
        ];
        for (field, controls, v01, v02, origins) in fields {
            let v12 = self.vmcs12.get32(field);
            writeln!(
                f,
                "{:<42} {:>10} {:>10} {:>10}  origin",
                field.sdm_name(),
                "VMCS01",
                "VMCS12",
                "VMCS02"
            )?;
            for control in controls.iter().filter(|c| (v01 | v12 | v02) & c.mask() != 0) {
                let bit = |v: u32| u32::from(v & control.mask() != 0);
                write!(f, "  {:<40} {:>10} {:>10} {:>10}", control.name, bit(v01), bit(v12), bit(v02))?;
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
            let v12 = self.vmcs12.get(*field);
            let mark = if v12 == *v02 { ' ' } else { '*' };
            writeln!(f, " {mark}{:<40} {v01:>#18x} {v12:>#18x} {v02:>#18x}", field.sdm_name())?;
        }
        Ok(())
    }

    fn control_rows(&self) -> Vec<Row> {
        let (a, c) = (&self.vmcs01.controls, &self.vmcs02.controls);
        vec![
            (Field::ExceptionBitmap, a.exception_bitmap.into(), c.exception_bitmap.into()),
            (Field::PageFaultErrorCodeMask, a.pfec_mask.into(), c.pfec_mask.into()),
            (Field::PageFaultErrorCodeMatch, a.pfec_match.into(), c.pfec_match.into()),
            (Field::IoBitmapA, a.io_bitmap_a.0, c.io_bitmap_a.0),
            (Field::IoBitmapB, a.io_bitmap_b.0, c.io_bitmap_b.0),
            (Field::MsrBitmap, a.msr_bitmap.0, c.msr_bitmap.0),
            (Field::TscOffset, a.tsc_offset, c.tsc_offset),
            (Field::TscMultiplier, a.tsc_multiplier, c.tsc_multiplier),
            (Field::Cr0Mask, a.cr0_mask, c.cr0_mask),
            (Field::Cr0Shadow, a.cr0_shadow, c.cr0_shadow),
            (Field::Cr4Mask, a.cr4_mask, c.cr4_mask),
            (Field::Cr4Shadow, a.cr4_shadow, c.cr4_shadow),
            (Field::Cr3TargetCount, a.cr3_target_count.into(), c.cr3_target_count.into()),
            (Field::ApicAccessAddress, a.apic_access.0, c.apic_access.0),
            (Field::VirtualApicAddress, a.virtual_apic.0, c.virtual_apic.0),
            (Field::TprThreshold, a.tpr_threshold.into(), c.tpr_threshold.into()),
            (Field::PostedInterruptVector, a.posted_vector.into(), c.posted_vector.into()),
            (Field::PostedInterruptDescriptor, a.posted_descriptor.0, c.posted_descriptor.0),
            (Field::Eptp, a.eptp, c.eptp),
            (Field::Vpid, a.vpid.into(), c.vpid.into()),
            (Field::VmFunctionControls, a.vm_functions, c.vm_functions),
            (Field::XssExitBitmap, a.xss_exit_bitmap, c.xss_exit_bitmap),
            (Field::EntryInterruptionInfo, a.entry_interruption.0.into(), c.entry_interruption.0.into()),
            (Field::EntryErrorCode, a.entry_error_code.into(), c.entry_error_code.into()),
        ]
    }

    fn guest_rows(&self) -> Vec<Row> {
        let (a, c) = (&self.vmcs01.guest, &self.vmcs02.guest);
        vec![
            (Field::GuestRip, a.rip, c.rip),
            (Field::GuestRsp, a.rsp, c.rsp),
            (Field::GuestRflags, a.rflags, c.rflags),
            (Field::GuestCr0, a.cr0, c.cr0),
            (Field::GuestCr3, a.cr3, c.cr3),
            (Field::GuestCr4, a.cr4, c.cr4),
            (Field::GuestDr7, a.dr7, c.dr7),
            (Field::GuestDebugctl, a.debugctl, c.debugctl),
            (Field::GuestEfer, a.efer, c.efer),
            (Field::GuestPat, a.pat, c.pat),
            (Field::GuestSysenterCs, a.sysenter_cs, c.sysenter_cs),
            (Field::GuestSysenterEsp, a.sysenter_esp, c.sysenter_esp),
            (Field::GuestSysenterEip, a.sysenter_eip, c.sysenter_eip),
            (Field::GuestActivity, a.activity as u64, c.activity as u64),
            (Field::GuestInterruptibility, a.interruptibility.into(), c.interruptibility.into()),
            (Field::GuestPendingDebug, a.pending_debug, c.pending_debug),
            (Field::GuestInterruptStatus, a.interrupt_status.into(), c.interrupt_status.into()),
            (Field::PreemptionTimer, a.preemption_timer.into(), c.preemption_timer.into()),
            (Field::GuestGdtrBase, a.gdtr.base, c.gdtr.base),
            (Field::GuestGdtrLimit, a.gdtr.limit.into(), c.gdtr.limit.into()),
            (Field::GuestIdtrBase, a.idtr.base, c.idtr.base),
            (Field::GuestIdtrLimit, a.idtr.limit.into(), c.idtr.limit.into()),
        ]
    }

    /// Segment registers as `selector base limit rights`.
    fn segments(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Segments (selector base limit access rights)")?;
        for (i, name) in seg::NAMES.iter().enumerate() {
            let sides = [
                ("01", self.vmcs01.guest.segments.get(i).copied()),
                ("12", Some(self.vmcs12.guest_segment(i))),
                ("02", self.vmcs02.guest.segments.get(i).copied()),
            ];
            for (side, s) in sides {
                let s = s.unwrap_or_default();
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
