//! Properties of all checks together, for any content of VMCS12.

use proptest::prelude::*;

use super::setup::Setup;
use super::*;

/// Values that are interesting to a field: edges, single bits, anything.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        (0u32..64).prop_map(|b| 1 << b),
        (0u32..64).prop_map(|b| !(1 << b)),
        0u64..0x1_0000,
        any::<u64>(),
    ]
}

fn field() -> impl Strategy<Value = Field> {
    (0..Field::COUNT).prop_map(|i| Field::ALL[i])
}

proptest! {
    /// Whatever L1 writes: no panic, the same report twice, and an answer that is what the
    /// failures say.
    #[test]
    fn any_content_gets_an_explained_answer(values in proptest::collection::vec(value(), Field::COUNT), long_mode: bool) {
        let mut s = Setup::base();
        s.l1_long_mode = long_mode;
        for (field, value) in Field::ALL.iter().zip(values) {
            s.set(*field, value);
        }
        let report = s.run();
        prop_assert_eq!(&s.run(), &report);
        explained(&report)?;
    }

    /// The same near a VMCS that passes, where each check is reached by itself.
    #[test]
    fn small_changes_get_an_explained_answer(changes in proptest::collection::vec((field(), value(), any::<bool>()), 1..5)) {
        let mut s = Setup::base();
        for (field, value, flip) in changes {
            let base = if flip { s.vmcs.get(field) } else { 0 };
            s.set(field, base ^ value);
        }
        let report = s.run();
        prop_assert_eq!(&s.run(), &report);
        explained(&report)?;
    }

    /// Exit information, the read shadows and other fields that no check is about don't
    /// change the answer (SDM Vol. 3C §27.2 and §27.3.1 name none of them).
    #[test]
    fn fields_without_rules_do_not_matter(v in any::<u64>()) {
        let mut s = Setup::base();
        for field in [
            Field::ExitReason, Field::ExitQualification, Field::Cr0Shadow, Field::Cr4Mask, Field::TscOffset,
            Field::ExceptionBitmap, Field::GuestRsp, Field::HostRsp, Field::GuestSysenterCs, Field::XssExitBitmap,
            Field::EoiExit2, Field::PreemptionTimer, Field::GuestSmbase, Field::PmlIndex,
        ] {
            s.set(field, v);
        }
        let report = s.run();
        prop_assert!(report.passed(), "{}", report);
    }
}

/// Each failure names a registered check with its section and fields, and the answer is
/// [`Answer::Enter`] only without failures.
fn explained(report: &Report) -> Result<(), TestCaseError> {
    prop_assert_eq!(report.passed(), report.architectural() == Answer::Enter);
    for f in report.failures() {
        let c = check(f.check);
        prop_assert_eq!((c.section, c.area), (f.section, f.area));
        prop_assert!(!f.fields.is_empty() && !f.message.is_empty() && !f.expected.is_empty());
        let text = f.to_string();
        prop_assert!(f.fields.iter().all(|(field, _)| text.contains(field.name())));
    }
    Ok(())
}
