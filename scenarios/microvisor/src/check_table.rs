// The cases for the checks of VM entry, one per check that L0 registers, with its name there. Included by
// the image, which runs them, and by the library, which lists them.
//
// From a valid VMCS, `setup` makes what the check needs; each list in `bad` then breaks its rule and
// the entry must fail as `expect` says; with each in `good` it must succeed.
check_table! {
    pin_controls_reserved "27.2.1.1" { custom: pin_reserved };
    primary_controls_reserved "27.2.1.1" { custom: primary_reserved };
    secondary_controls_reserved "27.2.1.1" { custom: secondary_reserved };
    cr3_target_count "27.2.1.1" { custom: cr3_targets };
    io_bitmap_addresses "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::IO_BITMAPS), Page(IO_A, 0), Page(IO_B, 0)],
        bad: [[Page(IO_A, 1)], [Page(IO_B, 0x800)], [Beyond(IO_A)], [Beyond(IO_B)], [Set(IO_B, 1 << 63)]],
        good: [[], [Page(IO_B, 0)], [Clear(PRIMARY, primary::IO_BITMAPS as u64), Set(IO_A, 1)]]
    };
    msr_bitmap_address "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::MSR_BITMAPS), Page(MSR_BITMAP, 0)],
        bad: [[Page(MSR_BITMAP, 0x10)], [Beyond(MSR_BITMAP)]],
        good: [[], [Clear(PRIMARY, primary::MSR_BITMAPS as u64), Set(MSR_BITMAP, 1)]]
    };
    virtual_apic_address "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Set(TPR_THRESHOLD, 0)],
        bad: [[Page(VIRTUAL_APIC, 0x40)], [Beyond(VIRTUAL_APIC)]],
        good: [[], [Clear(PRIMARY, primary::TPR_SHADOW as u64), Set(VIRTUAL_APIC, 1)]]
    };
    tpr_threshold_reserved "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Poke(VIRTUAL_APIC, 0x80, 0xf0)],
        bad: [[Set(TPR_THRESHOLD, 0x10)], [Set(TPR_THRESHOLD, 0x8000_0000)]],
        good: [[Set(TPR_THRESHOLD, 0xf)], [Clear(PRIMARY, primary::TPR_SHADOW as u64), Set(TPR_THRESHOLD, 0x10)]]
    };
    tpr_threshold_against_vtpr "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Poke(VIRTUAL_APIC, 0x80, 0x35)],
        bad: [[Set(TPR_THRESHOLD, 4)], [Set(TPR_THRESHOLD, 15)]],
        good: [[Set(TPR_THRESHOLD, 3)], [Set(TPR_THRESHOLD, 0)]]
    };
    virtual_nmis_need_nmi_exiting "27.2.1.1" {
        expect: Controls, setup: [], bad: [[Pin(pin::VIRTUAL_NMIS)]], good: [[Pin(pin::VIRTUAL_NMIS | pin::NMI)]]
    };
    nmi_window_needs_virtual_nmis "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::NMI_WINDOW)],
        bad: [[], [Pin(pin::NMI)]], good: [[Pin(pin::VIRTUAL_NMIS | pin::NMI)]]
    };
    apic_access_address "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::APIC_ACCESS), Page(APIC_ACCESS, 0)],
        bad: [[Page(APIC_ACCESS, 0x10)], [Beyond(APIC_ACCESS)]],
        good: [[], [Clear(SECONDARY, secondary::APIC_ACCESS as u64), Set(APIC_ACCESS, 1)]]
    };
    apic_virtualization_needs_tpr_shadow "27.2.1.1" {
        expect: Controls, setup: [Pin(pin::EXTERNAL), Page(VIRTUAL_APIC, 0)],
        bad: [[Secondary(secondary::X2APIC)], [Secondary(secondary::APIC_REGISTERS)], [Secondary(secondary::VIRTUAL_INTERRUPTS)]],
        good: [
            [Primary(primary::TPR_SHADOW), Secondary(secondary::X2APIC)],
            [Primary(primary::TPR_SHADOW), Secondary(secondary::APIC_REGISTERS)],
            [Primary(primary::TPR_SHADOW), Secondary(secondary::VIRTUAL_INTERRUPTS)]
        ]
    };
    x2apic_excludes_apic_accesses "27.2.1.1" {
        expect: Controls, setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Page(APIC_ACCESS, 0)],
        bad: [[Secondary(secondary::X2APIC | secondary::APIC_ACCESS)]],
        good: [[Secondary(secondary::X2APIC)], [Secondary(secondary::APIC_ACCESS)]]
    };
    virtual_interrupts_need_interrupt_exiting "27.2.1.1" {
        expect: Controls,
        setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Secondary(secondary::VIRTUAL_INTERRUPTS)],
        bad: [[]], good: [[Pin(pin::EXTERNAL)]]
    };
    posted_interrupts_need_virtual_interrupts "27.2.1.1" {
        expect: Controls,
        setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Pin(pin::EXTERNAL | pin::POSTED), Exit(exit::ACK),
            Page(POSTED_DESC, 0), Set(POSTED_VECTOR, 0x50)],
        bad: [[]], good: [[Secondary(secondary::VIRTUAL_INTERRUPTS)]]
    };
    posted_interrupts_need_acknowledge "27.2.1.1" {
        expect: Controls,
        setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Pin(pin::EXTERNAL | pin::POSTED),
            Secondary(secondary::VIRTUAL_INTERRUPTS), Page(POSTED_DESC, 0), Set(POSTED_VECTOR, 0x50)],
        bad: [[]], good: [[Exit(exit::ACK)]]
    };
    posted_interrupt_vector "27.2.1.1" {
        expect: Controls,
        setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Pin(pin::EXTERNAL | pin::POSTED), Exit(exit::ACK),
            Secondary(secondary::VIRTUAL_INTERRUPTS), Page(POSTED_DESC, 0)],
        bad: [[Set(POSTED_VECTOR, 0x100)], [Set(POSTED_VECTOR, 0xffff)]], good: [[Set(POSTED_VECTOR, 0xff)]]
    };
    posted_interrupt_descriptor "27.2.1.1" {
        expect: Controls,
        setup: [Primary(primary::TPR_SHADOW), Page(VIRTUAL_APIC, 0), Pin(pin::EXTERNAL | pin::POSTED), Exit(exit::ACK),
            Secondary(secondary::VIRTUAL_INTERRUPTS), Set(POSTED_VECTOR, 0x50)],
        bad: [[Page(POSTED_DESC, 1)], [Page(POSTED_DESC, 0x20)], [Beyond(POSTED_DESC)]], good: [[Page(POSTED_DESC, 0x40)]]
    };
    vpid_not_zero "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::VPID)],
        bad: [[Set(VPID, 0)]], good: [[Set(VPID, 1)], [Set(VPID, 0xffff)], [Clear(SECONDARY, secondary::VPID as u64), Set(VPID, 0)]]
    };
    eptp_memory_type "27.2.1.1" { custom: eptp_memory_type };
    eptp_walk_length "27.2.1.1" { custom: eptp_walk_length };
    eptp_accessed_dirty "27.2.1.1" { custom: eptp_accessed_dirty };
    eptp_reserved_bits "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::EPT)],
        bad: [[Or(EPTP, 1 << 8)], [Or(EPTP, 1 << 9)], [Or(EPTP, 1 << 10)], [Or(EPTP, 1 << 11)], [OrBeyond(EPTP)], [Or(EPTP, 1 << 63)]],
        good: [[], [Clear(SECONDARY, secondary::EPT as u64), Or(EPTP, 0xf80)]]
    };
    pml_needs_ept "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::PML), Page(PML_ADDR, 0)],
        bad: [[Clear(SECONDARY, secondary::EPT as u64)]], good: [[]]
    };
    pml_address "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::PML)],
        bad: [[Page(PML_ADDR, 8)], [Beyond(PML_ADDR)]], good: [[Page(PML_ADDR, 0)]]
    };
    unrestricted_guest_needs_ept "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::UNRESTRICTED)],
        bad: [[Clear(SECONDARY, secondary::EPT as u64)]], good: [[]]
    };
    mode_based_execute_needs_ept "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::MODE_BASED)],
        bad: [[Clear(SECONDARY, secondary::EPT as u64)]], good: [[]]
    };
    vm_function_controls_reserved "27.2.1.1" { custom: vm_functions };
    eptp_switching_needs_ept "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::VMFUNC), Set(VMFUNC_CTL, 1), Page(EPTP_LIST, 0)],
        bad: [[Clear(SECONDARY, secondary::EPT as u64)]], good: [[]]
    };
    eptp_list_address "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::VMFUNC), Set(VMFUNC_CTL, 1)],
        bad: [[Page(EPTP_LIST, 8)], [Beyond(EPTP_LIST)]],
        good: [[Page(EPTP_LIST, 0)], [Set(VMFUNC_CTL, 0), Set(EPTP_LIST, 1)]]
    };
    vmcs_shadowing_bitmaps "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::SHADOWING), Page(VMREAD_BITMAP, 0), Page(VMWRITE_BITMAP, 0)],
        bad: [[Page(VMREAD_BITMAP, 1)], [Page(VMWRITE_BITMAP, 0x20)], [Beyond(VMREAD_BITMAP)], [Beyond(VMWRITE_BITMAP)]],
        good: [[]]
    };
    tsc_multiplier_not_zero "27.2.1.1" {
        expect: Controls, setup: [Secondary(secondary::TSC_SCALING)],
        bad: [[Set(TSC_MULTIPLIER, 0)]], good: [[Set(TSC_MULTIPLIER, 1 << 48)], [Set(TSC_MULTIPLIER, 1)]]
    };

    exit_controls_reserved "27.2.1.2" { custom: exit_reserved };
    save_preemption_timer_needs_timer "27.2.1.2" {
        expect: Controls, setup: [Exit(exit::SAVE_TIMER)], bad: [[]], good: [[Pin(pin::TIMER)]]
    };
    exit_msr_store_area "27.2.1.2" {
        expect: Controls, setup: [Set(EXIT_STORE_COUNT, 1), Page(EXIT_STORE_ADDR, 0), Poke32(EXIT_STORE_ADDR, 0, 0x10)],
        bad: [[Page(EXIT_STORE_ADDR, 8)], [Beyond(EXIT_STORE_ADDR)], [BelowBeyond(EXIT_STORE_ADDR, 16), Set(EXIT_STORE_COUNT, 2)]],
        good: [[], [Set(EXIT_STORE_COUNT, 0), Set(EXIT_STORE_ADDR, 1)]]
    };
    exit_msr_load_area "27.2.1.2" {
        expect: Controls, setup: [Set(EXIT_LOAD_COUNT, 1), Page(EXIT_LOAD_ADDR, 0), Poke32(EXIT_LOAD_ADDR, 0, 0xc000_0102)],
        bad: [[Page(EXIT_LOAD_ADDR, 8)], [Beyond(EXIT_LOAD_ADDR)], [BelowBeyond(EXIT_LOAD_ADDR, 16), Set(EXIT_LOAD_COUNT, 2)]],
        good: [[], [Set(EXIT_LOAD_COUNT, 0), Set(EXIT_LOAD_ADDR, 1)]]
    };

    entry_controls_reserved "27.2.1.3" { custom: entry_reserved };
    injection_type "27.2.1.3" {
        expect: Controls, setup: [Set(GUEST_RFLAGS, 0x202)],
        bad: [[Set(ENTRY_INFO, 0x8000_0100)], [Set(ENTRY_INFO, 0x8000_0120)]],
        good: [[Set(ENTRY_INFO, 0x8000_0040)], [Set(ENTRY_INFO, 0x0000_0100)]]
    };
    injection_vector "27.2.1.3" {
        expect: Controls, setup: [],
        bad: [[Set(ENTRY_INFO, 0x8000_0203)], [Set(ENTRY_INFO, 0x8000_0200)], [Set(ENTRY_INFO, 0x8000_0320)], [Set(ENTRY_INFO, 0x8000_0701)]],
        good: [[Set(ENTRY_INFO, 0x8000_0202)], [Set(ENTRY_INFO, 0x8000_0306)], [Set(ENTRY_INFO, 0x8000_0313)]]
    };
    injection_error_code_required "27.2.1.3" {
        expect: Controls, setup: [],
        bad: [[Set(ENTRY_INFO, 0x8000_0308)], [Set(ENTRY_INFO, 0x8000_030a)], [Set(ENTRY_INFO, 0x8000_030b)], [Set(ENTRY_INFO, 0x8000_030c)],
            [Set(ENTRY_INFO, 0x8000_030d)], [Set(ENTRY_INFO, 0x8000_030e)], [Set(ENTRY_INFO, 0x8000_0311)]],
        good: [[Set(ENTRY_INFO, 0x8000_0b08)], [Set(ENTRY_INFO, 0x8000_0b0d)], [Set(ENTRY_INFO, 0x8000_0b0e)], [Set(ENTRY_INFO, 0x8000_0b11)]]
    };
    injection_error_code_forbidden "27.2.1.3" {
        expect: Controls, setup: [Set(GUEST_RFLAGS, 0x202), Set(ENTRY_LEN, 2)],
        bad: [[Set(ENTRY_INFO, 0x8000_0b06)], [Set(ENTRY_INFO, 0x8000_0b00)], [Set(ENTRY_INFO, 0x8000_0b12)], [Set(ENTRY_INFO, 0x8000_0840)],
            [Set(ENTRY_INFO, 0x8000_0a02)], [Set(ENTRY_INFO, 0x8000_0c40)], [Set(ENTRY_INFO, 0x8000_0e03)],
            [Setup(|vm| vm.real_mode(0x8000, 16)), Set(ENTRY_INFO, 0x8000_0b0d)]],
        good: [[Set(ENTRY_INFO, 0x8000_0306)], [Set(ENTRY_INFO, 0x8000_0c40 & !0x800)]]
    };
    injection_reserved_bits "27.2.1.3" {
        expect: Controls, setup: [],
        bad: [[Set(ENTRY_INFO, 0x8000_1306)], [Set(ENTRY_INFO, 0x8000_2306)], [Set(ENTRY_INFO, 0xc000_0306)], [Set(ENTRY_INFO, 0x8010_0306)]],
        good: [[Set(ENTRY_INFO, 0x8000_0306)], [Set(ENTRY_INFO, 0x7fff_f306)]]
    };
    injection_error_code_value "27.2.1.3" {
        expect: Controls, setup: [Set(ENTRY_INFO, 0x8000_0b0d)],
        bad: [[Set(ENTRY_CODE, 0x1_0000)], [Set(ENTRY_CODE, 0x8000_0000)]], good: [[Set(ENTRY_CODE, 0x7fff)], [Set(ENTRY_CODE, 0)]]
    };
    injection_instruction_length "27.2.1.3" { custom: injection_length };
    entry_msr_load_area "27.2.1.3" {
        expect: Controls, setup: [Set(ENTRY_LOAD_COUNT, 1), Page(ENTRY_LOAD_ADDR, 0), Poke32(ENTRY_LOAD_ADDR, 0, 0xc000_0102)],
        bad: [[Page(ENTRY_LOAD_ADDR, 8)], [Beyond(ENTRY_LOAD_ADDR)], [BelowBeyond(ENTRY_LOAD_ADDR, 16), Set(ENTRY_LOAD_COUNT, 2)]],
        good: [[], [Set(ENTRY_LOAD_COUNT, 0), Set(ENTRY_LOAD_ADDR, 1)]]
    };
    entry_smm_controls "27.2.1.3" {
        expect: Controls, setup: [], bad: [[Or(ENTRY_CTL, 0x400)], [Or(ENTRY_CTL, 0x800)]], good: [[]]
    };

    host_cr0 "27.2.2" {
        expect: Host, setup: [],
        bad: [[Clear(HOST_CR0, 1)], [Clear(HOST_CR0, 0x20)], [Clear(HOST_CR0, 1 << 31)], [Or(HOST_CR0, 1 << 32)], [Or(HOST_CR0, 1 << 63)]],
        good: [[Or(HOST_CR0, 0x6000_0000)], [Or(HOST_CR0, 0x1_0000)]]
    };
    host_cr4 "27.2.2" {
        expect: Host, setup: [],
        bad: [[Clear(HOST_CR4, 1 << 13)], [Or(HOST_CR4, 1 << 63)], [Or(HOST_CR4, 1 << 31)], [Or(HOST_CR4, 1 << 15)]],
        good: [[Or(HOST_CR4, 4)]]
    };
    host_cr3 "27.2.2" { expect: Host, setup: [], bad: [[OrBeyond(HOST_CR3)], [Or(HOST_CR3, 1 << 63)]], good: [[Or(HOST_CR3, 0x18)]] };
    host_sysenter "27.2.2" {
        expect: Host, setup: [],
        bad: [[Set(HOST_SYSENTER_ESP, 1 << 47)], [Set(HOST_SYSENTER_EIP, 1 << 63)]],
        good: [[Set(HOST_SYSENTER_ESP, 0xffff_8000_0000_0000)], [Set(HOST_SYSENTER_EIP, 0x7fff_ffff_ffff)]]
    };
    host_perf_global_ctrl "27.2.2" {
        expect: Host, setup: [Exit(exit::LOAD_PERF), SetMsr(HOST_PERF, 0x38f)], bad: [[Or(HOST_PERF, 1 << 63)], [Or(HOST_PERF, 1 << 31)]], good: [[]]
    };
    host_pat "27.2.2" {
        expect: Host, setup: [Exit(exit::LOAD_PAT), SetMsr(HOST_PAT, 0x277)],
        bad: [[Set(HOST_PAT, 0x0007_0406_0007_0402)], [Set(HOST_PAT, 0x0307_0406_0007_0406)], [Set(HOST_PAT, 0x0007_0406_0807_0406)]],
        good: [[], [Set(HOST_PAT, 0x0007_0406_0107_0506)]]
    };
    host_efer_reserved "27.2.2" {
        expect: Host, setup: [Exit(exit::LOAD_EFER), SetMsr(HOST_EFER, 0xc000_0080)],
        bad: [[Or(HOST_EFER, 2)], [Or(HOST_EFER, 1 << 9)], [Or(HOST_EFER, 1 << 63)]], good: [[], [Or(HOST_EFER, 1)]]
    };
    host_efer_mode "27.2.2" {
        expect: Host, setup: [Exit(exit::LOAD_EFER), SetMsr(HOST_EFER, 0xc000_0080)],
        bad: [[Clear(HOST_EFER, 0x100)], [Clear(HOST_EFER, 0x400)], [Clear(HOST_EFER, 0x500)]], good: [[]]
    };
    host_selector_rpl_ti "27.2.3" {
        expect: Host, setup: [],
        bad: [[Or(HOST_CS, 1)], [Or(HOST_SS, 2)], [Or(HOST_DS, 4)], [Or(HOST_ES, 3)], [Or(HOST_FS, 4)], [Or(HOST_GS, 1)], [Or(HOST_TR, 4)]],
        good: [[Set(HOST_DS, 0)], [Set(HOST_FS, 0x10)]]
    };
    host_cs_tr_not_null "27.2.3" { expect: Host, setup: [], bad: [[Set(HOST_CS, 0)], [Set(HOST_TR, 0)]], good: [[Set(HOST_ES, 0), Set(HOST_GS, 0)]] };
    host_ss_not_null "27.2.3" {
        expect: Host, setup: [Set(HOST_SS, 0)], bad: [[Clear(EXIT_CTL, exit::HOST_64 as u64), Clear(ENTRY_CTL, entry::IA32E as u64)]], good: [[]]
    };
    host_bases_canonical "27.2.3" {
        expect: Host, setup: [],
        bad: [[Set(HOST_FS_BASE, 1 << 47)], [Set(HOST_GS_BASE, 1 << 63)], [Set(HOST_GDTR, 1 << 48)], [Set(HOST_IDTR, 1 << 62)], [Set(HOST_TR_BASE, 1 << 47)]],
        good: [[Set(HOST_FS_BASE, 0xffff_8000_0000_0000)], [Set(HOST_GS_BASE, 0x7fff_ffff_ffff)]]
    };
    legacy_mode_address_spaces "27.2.4" { custom: legacy_mode };
    long_mode_host_address_space "27.2.4" {
        expect: Host, setup: [], bad: [[Clear(EXIT_CTL, exit::HOST_64 as u64)]], good: [[]]
    };
    host_32_bit_state "27.2.4" {
        expect: Host, setup: [],
        bad: [[Clear(EXIT_CTL, exit::HOST_64 as u64), Or(HOST_CR4, 1 << 17)], [Clear(EXIT_CTL, exit::HOST_64 as u64), Set(HOST_RIP, 1 << 32)]],
        good: [[]]
    };
    host_64_bit_state "27.2.4" { expect: Host, setup: [], bad: [[Clear(HOST_CR4, 0x20)], [Set(HOST_RIP, 1 << 47)], [Or(HOST_RIP, 1 << 63)]], good: [[]] };

    guest_cr0 "27.3.1.1" {
        expect: Guest(0), setup: [],
        bad: [[Clear(GUEST_CR0, 1)], [Clear(GUEST_CR0, 0x20)], [Clear(GUEST_CR0, 1 << 31)], [Or(GUEST_CR0, 1 << 32)]],
        good: [[Or(GUEST_CR0, 0x6000_0000)], [Or(GUEST_CR0, 8)]]
    };
    guest_paging_needs_protection "27.3.1.1" {
        expect: Guest(0), setup: [Secondary(secondary::UNRESTRICTED), Setup(legacy)], bad: [[Clear(GUEST_CR0, 1)]], good: [[Setup(|vm| vm.real_mode(0x8000, 16))]]
    };
    guest_cr4 "27.3.1.1" {
        expect: Guest(0), setup: [], bad: [[Clear(GUEST_CR4, 1 << 13)], [Or(GUEST_CR4, 1 << 63)], [Or(GUEST_CR4, 1 << 31)], [Or(GUEST_CR4, 1 << 15)]],
        good: [[Or(GUEST_CR4, 4)]]
    };
    guest_debugctl "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_DEBUG)], bad: [[Set(GUEST_DEBUGCTL, 1 << 63)], [Set(GUEST_DEBUGCTL, 1 << 16)]],
        good: [[Set(GUEST_DEBUGCTL, 2)], [Clear(ENTRY_CTL, entry::LOAD_DEBUG as u64), Set(GUEST_DEBUGCTL, 1 << 16)]]
    };
    guest_ia32e_paging "27.3.1.1" { expect: Guest(0), setup: [], bad: [[Clear(GUEST_CR4, 0x20)], [Clear(GUEST_CR0, 1 << 31)]], good: [[]] };
    guest_pcid_needs_ia32e "27.3.1.1" { expect: Guest(0), setup: [Setup(legacy)], bad: [[Or(GUEST_CR4, 1 << 17)]], good: [[]] };
    guest_cr3 "27.3.1.1" { expect: Guest(0), setup: [], bad: [[OrBeyond(GUEST_CR3)], [Or(GUEST_CR3, 1 << 63)]], good: [[Or(GUEST_CR3, 0x18)]] };
    guest_dr7 "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_DEBUG)], bad: [[Or(GUEST_DR7, 1 << 32)], [Or(GUEST_DR7, 1 << 63)]],
        good: [[], [Clear(ENTRY_CTL, entry::LOAD_DEBUG as u64), Or(GUEST_DR7, 1 << 32)]]
    };
    guest_sysenter "27.3.1.1" {
        expect: Guest(0), setup: [], bad: [[Set(GUEST_SYSENTER_ESP, 1 << 47)], [Set(GUEST_SYSENTER_EIP, 1 << 63)]], good: [[Set(GUEST_SYSENTER_ESP, 0xffff_8000_0000_0000)]]
    };
    guest_perf_global_ctrl "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_PERF), SetMsr(GUEST_PERF, 0x38f)], bad: [[Or(GUEST_PERF, 1 << 63)]], good: [[]]
    };
    guest_pat "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_PAT), SetMsr(GUEST_PAT, 0x277)],
        bad: [[Set(GUEST_PAT, 0x0007_0406_0007_0403)], [Set(GUEST_PAT, 0x0907_0406_0007_0406)]], good: [[], [Set(GUEST_PAT, 0x0106_0406_0007_0506)]]
    };
    guest_efer_reserved "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_EFER), SetMsr(GUEST_EFER, 0xc000_0080)], bad: [[Or(GUEST_EFER, 2)], [Or(GUEST_EFER, 1 << 63)]], good: [[], [Or(GUEST_EFER, 1)]]
    };
    guest_efer_lma "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_EFER), SetMsr(GUEST_EFER, 0xc000_0080)],
        bad: [[Clear(GUEST_EFER, 0x400)], [Clear(GUEST_EFER, 0x500)], [Setup(legacy)]], good: [[], [Setup(legacy), Clear(GUEST_EFER, 0x500)]]
    };
    guest_efer_lme "27.3.1.1" {
        expect: Guest(0), setup: [Entry(entry::LOAD_EFER), SetMsr(GUEST_EFER, 0xc000_0080)], bad: [[Clear(GUEST_EFER, 0x100)]], good: [[]]
    };

    tr_selector_ti "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Or(TR_SEL, 4)]], good: [[Or(TR_SEL, 3)]] };
    ldtr_selector_ti "27.3.1.2" { expect: Guest(0), setup: [Setup(ldtr)], bad: [[Or(LDTR_SEL, 4)]], good: [[], [Or(LDTR_SEL, 4), Set(LDTR_AR, 0x1_0000)]] };
    ss_selector_rpl "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Or(SS_SEL, 3)], [Or(CS_SEL, 1)]], good: [[Or(SS_SEL, 3), Secondary(secondary::UNRESTRICTED)]]
    };
    v8086_segment_bases "27.3.1.2" {
        expect: Guest(0), setup: [Setup(v8086)],
        bad: [[Set(ES_BASE, 1)], [Set(CS_BASE, 0x1_0000)], [Set(SS_BASE, 8)], [Set(DS_BASE, 0x10)], [Set(FS_BASE, 1)], [Set(GS_BASE, 1 << 31)]], good: [[]]
    };
    tr_fs_gs_bases_canonical "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(TR_BASE, 1 << 47)], [Set(FS_BASE, 1 << 63)], [Set(GS_BASE, 1 << 48)]], good: [[Set(FS_BASE, 0xffff_8000_0000_0000)]]
    };
    ldtr_base_canonical "27.3.1.2" {
        expect: Guest(0), setup: [Setup(ldtr)], bad: [[Set(LDTR_BASE, 1 << 47)]], good: [[], [Set(LDTR_BASE, 1 << 47), Set(LDTR_AR, 0x1_0000)]]
    };
    cs_base_high "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Set(CS_BASE, 1 << 32)], [Set(CS_BASE, 1 << 63)]], good: [[]] };
    ss_ds_es_bases_high "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(SS_BASE, 1 << 32)], [Set(DS_BASE, 1 << 63)], [Set(ES_BASE, 1 << 40)]],
        good: [[Set(DS_BASE, 1 << 32), Set(DS_AR, 0x1_0000)], [Set(ES_BASE, 0xffff_f000)]]
    };
    v8086_segment_limits "27.3.1.2" {
        expect: Guest(0), setup: [Setup(v8086)],
        bad: [[Set(ES_LIMIT, 0xfffe)], [Set(CS_LIMIT, 0x1_ffff)], [Set(SS_LIMIT, 0)], [Set(DS_LIMIT, 0xffff_ffff)], [Set(FS_LIMIT, 0xfff)], [Set(GS_LIMIT, 0xf_ffff)]], good: [[]]
    };
    v8086_segment_access_rights "27.3.1.2" {
        expect: Guest(0), setup: [Setup(v8086)],
        bad: [[Set(ES_AR, 0x93)], [Set(CS_AR, 0xfb)], [Set(SS_AR, 0xf2)], [Set(DS_AR, 0x1_00f3)], [Set(FS_AR, 0x40f3)], [Set(GS_AR, 0x73)]], good: [[]]
    };
    cs_type "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(CS_AR, 0xa093)], [Set(CS_AR, 0xa098)], [Set(CS_AR, 0xa09a)], [Set(CS_AR, 0xa09c)], [Set(CS_AR, 0xa091)], [Set(CS_AR, 0xa097)]],
        good: [[Set(CS_AR, 0xa099)], [Set(CS_AR, 0xa09d)], [Set(CS_AR, 0xa09f)], [Setup(|vm| vm.real_mode(0x8000, 16)), Set(CS_AR, 0x93)]]
    };
    ss_type "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(SS_AR, 0xc091)], [Set(SS_AR, 0xc092)], [Set(SS_AR, 0xc095)], [Set(SS_AR, 0xc09b)]], good: [[Set(SS_AR, 0xc097), Set(SS_LIMIT, 0xfff)], [Set(SS_AR, 0x1_0000)]]
    };
    data_segments_accessed "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(DS_AR, 0xc092)], [Set(ES_AR, 0xc090)], [Set(FS_AR, 0xc09a)], [Set(GS_AR, 0xc096)]], good: [[Set(DS_AR, 0xc091)], [Set(ES_AR, 0x1_c092)]]
    };
    data_segments_readable "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(DS_AR, 0xc099)], [Set(ES_AR, 0xc09d)], [Set(FS_AR, 0xc099)], [Set(GS_AR, 0xc099)]], good: [[Set(DS_AR, 0xc09b)], [Set(GS_AR, 0xc09f)]]
    };
    segments_not_system "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(CS_AR, 0xa08b)], [Set(SS_AR, 0xc083)], [Set(DS_AR, 0xc083)], [Set(ES_AR, 0xc083)], [Set(FS_AR, 0xc083)], [Set(GS_AR, 0xc083)]], good: [[Set(GS_AR, 0x1_c083)]]
    };
    cs_dpl "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(CS_AR, 0xa0fb)], [Set(CS_AR, 0xa0bb)], [Set(CS_AR, 0xa0ff)]],
        good: [[Set(CS_AR, 0xa09f), Or(CS_SEL, 3), Or(SS_SEL, 3), Set(SS_AR, 0xc0f3)], [Set(CS_AR, 0xa0fb), Or(CS_SEL, 3), Or(SS_SEL, 3), Set(SS_AR, 0xc0f3)]]
    };
    ss_dpl_rpl "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(SS_AR, 0xc0f3), Set(CS_AR, 0xa0fb)], [Set(SS_AR, 0xc0b3), Set(CS_AR, 0xa09f)]], good: [[Secondary(secondary::UNRESTRICTED), Set(SS_AR, 0xc0f3), Set(CS_AR, 0xa0fb)]]
    };
    ss_dpl_zero "27.3.1.2" {
        expect: Guest(0), setup: [Setup(|vm| vm.real_mode(0x8000, 16))], bad: [[Set(SS_AR, 0xf3), Set(CS_AR, 0xfb)], [Set(SS_AR, 0xf3), Set(CS_AR, 0x93)]], good: [[]]
    };
    data_segments_dpl "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Or(DS_SEL, 3)], [Or(ES_SEL, 1)], [Or(FS_SEL, 2)], [Or(GS_SEL, 3)]],
        good: [[Or(DS_SEL, 3), Set(DS_AR, 0xc0f3)], [Or(ES_SEL, 3), Set(ES_AR, 0xc09f)], [Or(GS_SEL, 3), Set(GS_AR, 0x1_c093)], [Or(FS_SEL, 3), Secondary(secondary::UNRESTRICTED)]]
    };
    segments_present "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(CS_AR, 0xa01b)], [Set(SS_AR, 0xc013)], [Set(DS_AR, 0xc013)], [Set(ES_AR, 0xc013)], [Set(FS_AR, 0xc013)], [Set(GS_AR, 0xc013)]], good: [[Set(FS_AR, 0x1_c013)]]
    };
    segments_reserved_low "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Or(CS_AR, 0x100)], [Or(SS_AR, 0x200)], [Or(DS_AR, 0x400)], [Or(ES_AR, 0x800)], [Or(FS_AR, 0x100)], [Or(GS_AR, 0xf00)]], good: [[Or(GS_AR, 0x1_0f00)]]
    };
    cs_default_size "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Set(CS_AR, 0xe09b)]], good: [[Set(CS_AR, 0xc09b)], [Set(CS_AR, 0xa09b)]] };
    segments_granularity "27.3.1.2" {
        expect: Guest(0), setup: [],
        bad: [[Set(CS_LIMIT, 0xffff_fffe)], [Set(CS_AR, 0x209b)], [Set(SS_LIMIT, 0)], [Set(DS_AR, 0x4093), Set(DS_LIMIT, 0x10_0fff)], [Set(ES_LIMIT, 0xf_f000)], [Set(GS_LIMIT, 0xffe)]],
        good: [[Set(CS_AR, 0x209b), Set(CS_LIMIT, 0xf_ffff)], [Set(DS_AR, 0x4093), Set(DS_LIMIT, 0x1234)], [Set(ES_LIMIT, 0xfff)]]
    };
    segments_reserved_high "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Or(CS_AR, 1 << 17)], [Or(SS_AR, 1 << 31)], [Or(DS_AR, 1 << 20)], [Or(ES_AR, 1 << 17)], [Or(FS_AR, 1 << 18)], [Or(GS_AR, 1 << 30)]], good: [[Or(GS_AR, 1 << 16 | 1 << 17)]]
    };
    tr_type "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(TR_AR, 0x89)], [Set(TR_AR, 0x83)], [Set(TR_AR, 0x82)], [Set(TR_AR, 0x8f)]], good: [[], [Setup(legacy), Set(TR_AR, 0x83)]]
    };
    tr_system "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Set(TR_AR, 0x9b)]], good: [[]] };
    tr_present "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Set(TR_AR, 0x0b)]], good: [[]] };
    tr_reserved_low "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Or(TR_AR, 0x100)], [Or(TR_AR, 0x800)]], good: [[]] };
    tr_granularity "27.3.1.2" {
        expect: Guest(0), setup: [], bad: [[Set(TR_AR, 0x808b)], [Set(TR_LIMIT, 0x10_0fff)]], good: [[Set(TR_AR, 0x808b), Set(TR_LIMIT, 0xfff)], [Set(TR_LIMIT, 0xf_ffff)]]
    };
    tr_usable "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Or(TR_AR, 1 << 16)]], good: [[]] };
    tr_reserved_high "27.3.1.2" { expect: Guest(0), setup: [], bad: [[Or(TR_AR, 1 << 17)], [Or(TR_AR, 1 << 31)]], good: [[]] };
    ldtr_type "27.3.1.2" { expect: Guest(0), setup: [Setup(ldtr)], bad: [[Set(LDTR_AR, 0x83)], [Set(LDTR_AR, 0x8b)]], good: [[], [Set(LDTR_AR, 0x1_0083)]] };
    ldtr_system "27.3.1.2" { expect: Guest(0), setup: [Setup(ldtr)], bad: [[Set(LDTR_AR, 0x92)]], good: [[], [Set(LDTR_AR, 0x1_0092)]] };
    ldtr_present "27.3.1.2" { expect: Guest(0), setup: [Setup(ldtr)], bad: [[Set(LDTR_AR, 0x02)]], good: [[], [Set(LDTR_AR, 0x1_0002)]] };
    ldtr_reserved_low "27.3.1.2" { expect: Guest(0), setup: [Setup(ldtr)], bad: [[Or(LDTR_AR, 0x100)], [Or(LDTR_AR, 0x800)]], good: [[], [Set(LDTR_AR, 0x1_0182)]] };
    ldtr_granularity "27.3.1.2" {
        expect: Guest(0), setup: [Setup(ldtr)], bad: [[Set(LDTR_AR, 0x8082), Set(LDTR_LIMIT, 0x10)], [Set(LDTR_LIMIT, 0x10_0fff)]], good: [[Set(LDTR_AR, 0x8082), Set(LDTR_LIMIT, 0xfff)]]
    };
    ldtr_reserved_high "27.3.1.2" { expect: Guest(0), setup: [Setup(ldtr)], bad: [[Or(LDTR_AR, 1 << 17)], [Or(LDTR_AR, 1 << 31)]], good: [[], [Set(LDTR_AR, 0x3_0082)]] };

    descriptor_table_bases "27.3.1.3" { expect: Guest(0), setup: [], bad: [[Set(GDTR_BASE, 1 << 47)], [Set(IDTR_BASE, 1 << 63)]], good: [[Set(GDTR_BASE, 0xffff_8000_0000_0000)]] };
    descriptor_table_limits "27.3.1.3" { expect: Guest(0), setup: [], bad: [[Set(GDTR_LIMIT, 0x1_0000)], [Set(IDTR_LIMIT, 0x8000_0fff)]], good: [[Set(GDTR_LIMIT, 0xffff)]] };
    guest_rip "27.3.1.4" {
        expect: Guest(0), setup: [], bad: [[Set(GUEST_RIP, 1 << 63)], [Set(GUEST_RIP, 1 << 48)], [Set(CS_AR, 0xc09b), Or(GUEST_RIP, 1 << 32)], [Setup(legacy), Or(GUEST_RIP, 1 << 40)]],
        good: [[Set(GUEST_RIP, 0x7fff_ffff_f000)], [Set(GUEST_RIP, 0xffff_8000_0000_0000)]]
    };
    rflags_reserved "27.3.1.4" {
        expect: Guest(0), setup: [],
        bad: [[Clear(GUEST_RFLAGS, 2)], [Or(GUEST_RFLAGS, 8)], [Or(GUEST_RFLAGS, 0x20)], [Or(GUEST_RFLAGS, 0x8000)], [Or(GUEST_RFLAGS, 1 << 22)], [Or(GUEST_RFLAGS, 1 << 63)]],
        good: [[Or(GUEST_RFLAGS, 0x8d5)], [Or(GUEST_RFLAGS, 1 << 21)]]
    };
    rflags_virtual_8086 "27.3.1.4" { expect: Guest(0), setup: [], bad: [[Or(GUEST_RFLAGS, 1 << 17)]], good: [[Setup(v8086)]] };
    rflags_interrupt_flag "27.3.1.4" { expect: Guest(0), setup: [Set(ENTRY_INFO, 0x8000_0040)], bad: [[]], good: [[Or(GUEST_RFLAGS, 0x200)]] };
    activity_supported "27.3.1.5" { custom: activity_supported };
    activity_hlt_cpl "27.3.1.5" { expect: Guest(0), setup: [Setup(user), Timer], bad: [[Set(ACTIVITY, 1)]], good: [[]] };
    activity_blocking "27.3.1.5" {
        expect: Guest(0), setup: [Timer, Or(GUEST_RFLAGS, 0x200)], bad: [[Set(ACTIVITY, 1), Set(INTERRUPTIBILITY, 1)], [Set(ACTIVITY, 1), Set(INTERRUPTIBILITY, 2)]],
        good: [[Set(INTERRUPTIBILITY, 1)], [Set(INTERRUPTIBILITY, 2)], [Set(ACTIVITY, 1)]]
    };
    activity_injection "27.3.1.5" { custom: activity_injection };
    interruptibility_reserved "27.3.1.5" { expect: Guest(0), setup: [], bad: [[Or(INTERRUPTIBILITY, 1 << 5)], [Or(INTERRUPTIBILITY, 1 << 31)]], good: [[Set(INTERRUPTIBILITY, 8)]] };
    interruptibility_sti_and_mov_ss "27.3.1.5" { expect: Guest(0), setup: [Or(GUEST_RFLAGS, 0x200)], bad: [[Set(INTERRUPTIBILITY, 3)]], good: [[Set(INTERRUPTIBILITY, 1)], [Set(INTERRUPTIBILITY, 2)]] };
    interruptibility_sti_needs_if "27.3.1.5" { expect: Guest(0), setup: [Set(INTERRUPTIBILITY, 1)], bad: [[]], good: [[Or(GUEST_RFLAGS, 0x200)]] };
    interruptibility_external_interrupt "27.3.1.5" {
        expect: Guest(0), setup: [Or(GUEST_RFLAGS, 0x200), Set(ENTRY_INFO, 0x8000_0040)], bad: [[Set(INTERRUPTIBILITY, 1)], [Set(INTERRUPTIBILITY, 2)]], good: [[Set(INTERRUPTIBILITY, 0)]]
    };
    interruptibility_nmi_mov_ss "27.3.1.5" { expect: Guest(0), setup: [Set(ENTRY_INFO, 0x8000_0202)], bad: [[Set(INTERRUPTIBILITY, 2)]], good: [[]] };
    interruptibility_smi "27.3.1.5" { expect: Guest(0), setup: [], bad: [[Set(INTERRUPTIBILITY, 4)]], good: [[]] };
    interruptibility_virtual_nmi "27.3.1.5" {
        expect: Guest(0), setup: [Set(ENTRY_INFO, 0x8000_0202), Set(INTERRUPTIBILITY, 8)], bad: [[Pin(pin::VIRTUAL_NMIS | pin::NMI)]], good: [[], [Pin(pin::NMI)]]
    };
    interruptibility_enclave "27.3.1.5" { expect: Guest(0), setup: [], bad: [[Set(INTERRUPTIBILITY, 0x10)]], good: [[]] };
    pending_debug_reserved "27.3.1.5" {
        expect: Guest(0), setup: [], bad: [[Set(PENDING_DEBUG, 0x10)], [Set(PENDING_DEBUG, 1 << 13)], [Set(PENDING_DEBUG, 1 << 15)], [Set(PENDING_DEBUG, 1 << 17)], [Set(PENDING_DEBUG, 1 << 63)]],
        good: [[Set(PENDING_DEBUG, 0x100f)]]
    };
    pending_debug_single_step "27.3.1.5" {
        expect: Guest(0), setup: [Set(GUEST_RFLAGS, 0x302), Set(INTERRUPTIBILITY, 1)], bad: [[Set(PENDING_DEBUG, 0)]], good: [[Set(PENDING_DEBUG, 0x4000)], [Set(GUEST_DEBUGCTL, 2), Entry(entry::LOAD_DEBUG)]]
    };
    pending_debug_no_single_step "27.3.1.5" {
        expect: Guest(0), setup: [Set(GUEST_RFLAGS, 0x202), Set(PENDING_DEBUG, 0x4000)], bad: [[Set(INTERRUPTIBILITY, 1)], [Set(INTERRUPTIBILITY, 2)], [Set(INTERRUPTIBILITY, 1), Set(GUEST_RFLAGS, 0x302), Set(GUEST_DEBUGCTL, 2)]],
        good: [[], [Set(INTERRUPTIBILITY, 1), Set(GUEST_RFLAGS, 0x302)]]
    };
    pending_debug_rtm "27.3.1.5" { expect: Guest(0), setup: [], bad: [[Set(PENDING_DEBUG, 0x1_1000)]], good: [[Set(PENDING_DEBUG, 0)]] };
    interruptibility_nmi_sti "27.3.1.5" { custom: nmi_blocked_by_sti };
    link_pointer_address "27.3.1.5" { expect: Guest(4), setup: [], bad: [[Page(LINK, 8)], [Beyond(LINK)], [Set(LINK, 1)]], good: [[]] };
    link_pointer_revision "27.3.1.5" { expect: Guest(4), setup: [Page(LINK, 0)], bad: [[Poke32(LINK, 0, 0x7654_3210)]], good: [[Revision(LINK, 0)]] };
    link_pointer_shadow_indicator "27.3.1.5" { expect: Guest(4), setup: [Page(LINK, 0)], bad: [[Revision(LINK, 1 << 31)]], good: [[Revision(LINK, 0)]] };
    link_pointer_not_current "27.3.1.5" { expect: Guest(4), setup: [], bad: [[Setup(|vm| vm.set(LINK, vm.vmcs))]], good: [[Page(LINK, 0), Revision(LINK, 0)]] };
    guest_pdptes "27.3.1.6" {
        expect: Guest(2), setup: [Setup(pae), Secondary(secondary::EPT)],
        bad: [[Set(PDPTE0, 3)], [Set(PDPTE1, 5)], [Set(PDPTE2, 0x21)], [Set(PDPTE3, 0x101)], [Set(PDPTE0, 1 << 63 | 1)], [Set(PDPTE0, 1), OrBeyond(PDPTE0)]],
        good: [[Set(PDPTE0, 0)], [Set(PDPTE0, 0x1001)], [Set(PDPTE1, 0x1e6)]]
    };
    memory_pdptes "27.3.1.6" {
        expect: Guest(2), setup: [Setup(pae), Clear(SECONDARY, secondary::EPT as u64), Page(GUEST_CR3, 0)],
        bad: [[Poke32(GUEST_CR3, 0, 3)], [Poke32(GUEST_CR3, 8, 0x1e1)], [Poke32(GUEST_CR3, 24, 1), Poke32(GUEST_CR3, 28, 1 << 31)]],
        good: [[], [Poke32(GUEST_CR3, 0, 0x1001)], [Poke32(GUEST_CR3, 32, 3)]]
    };
}
