//! The `cpu` section of `qemu-system-x86_64`: registers, model specific registers, and subsections for what a guest may
//! or may not have used.
//!
//! Source: `target/i386/machine.c` `vmstate_x86_cpu`, 10.0; `target/i386/cpu.h`, `target/i386/kvm/hyperv-proto.h` and
//! `linux-headers/asm-x86/kvm.h` for the lengths of arrays. What came after version 12 came as subsections, each with a
//! name of its own, so that one table serves every QEMU that writes that version.

use crate::qemu::vmdesc::{Description, Device, Field};

/// The name of the section.
pub(super) const CPU_SECTION: &str = "cpu";
/// The version of its payload.
pub(super) const CPU_VERSION: u32 = 12;

/// A schema: a struct's or a subsection's.
struct Schema {
    name: &'static str,
    version: i64,
    fields: &'static [Row],
    subsections: &'static [Schema],
}

/// One or more fields.
enum Row {
    /// A number: name, type, length in bytes.
    One(&'static str, &'static str, u64),
    /// An array of numbers: name, type, length of one in bytes, how many.
    Many(&'static str, &'static str, u64, u64),
    /// A struct.
    Struct(&'static str, &'static Schema),
    /// An array of structs: name, schema, how many.
    Structs(&'static str, &'static Schema, u64),
    /// A field whose value is made for the stream.
    Tmp(&'static Schema),
}

use Row::{Many, One, Struct, Structs, Tmp};

const fn u8(name: &'static str) -> Row {
    One(name, "uint8", 1)
}

const fn u16(name: &'static str) -> Row {
    One(name, "uint16", 2)
}

const fn u32(name: &'static str) -> Row {
    One(name, "uint32", 4)
}

const fn i32(name: &'static str) -> Row {
    One(name, "int32", 4)
}

const fn u64(name: &'static str) -> Row {
    One(name, "uint64", 8)
}

const fn u64s(name: &'static str, count: u64) -> Row {
    Many(name, "uint64", 8, count)
}

const fn part(name: &'static str, version: i64, fields: &'static [Row]) -> Schema {
    Schema { name, version, fields, subsections: &[] }
}

/// A subsection: all of them have the version 1.
const fn sub(name: &'static str, fields: &'static [Row]) -> Schema {
    part(name, 1, fields)
}

const SEGMENT: Schema = part("segment", 1, &[u32("selector"), u64("base"), u32("limit"), u32("flags")]);
const FPREG_TMP: Schema = part("fpreg_tmp", 0, &[u64("tmp_mant"), u16("tmp_exp")]);
const FPREG: Schema = part("fpreg", 0, &[Tmp(&FPREG_TMP)]);
const XMM: Schema = part("xmm_reg", 1, &[u64("_q_ZMMReg[0]"), u64("_q_ZMMReg[1]")]);
const YMMH: Schema = part("ymmh_reg", 1, &[u64("_q_ZMMReg[2]"), u64("_q_ZMMReg[3]")]);
const ZMMH: Schema = part(
    "zmmh_reg",
    1,
    &[u64("_q_ZMMReg[4]"), u64("_q_ZMMReg[5]"), u64("_q_ZMMReg[6]"), u64("_q_ZMMReg[7]")],
);
const HI16_ZMM: Schema = part(
    "hi16_zmm_reg",
    1,
    &[
        u64("_q_ZMMReg[0]"),
        u64("_q_ZMMReg[1]"),
        u64("_q_ZMMReg[2]"),
        u64("_q_ZMMReg[3]"),
        u64("_q_ZMMReg[4]"),
        u64("_q_ZMMReg[5]"),
        u64("_q_ZMMReg[6]"),
        u64("_q_ZMMReg[7]"),
    ],
);
const BND: Schema = part("bnd_regs", 1, &[u64("lb"), u64("ub")]);
const MTRR_VAR: Schema = part("mtrr_var", 1, &[u64("base"), u64("mask")]);
const LBR: Schema = part("lbr_records_var", 1, &[u64("from"), u64("to"), u64("info")]);
const KVM_NESTED_STATE: Schema = Schema {
    name: "cpu/kvm_nested_state",
    version: 1,
    fields: &[u16("flags"), u16("format"), u32("size")],
    subsections: &[
        Schema {
            name: "cpu/kvm_nested_state/vmx",
            version: 1,
            fields: &[u64("hdr.vmx.vmxon_pa"), u64("hdr.vmx.vmcs12_pa"), u16("hdr.vmx.smm.flags")],
            subsections: &[
                sub("cpu/kvm_nested_state/vmx/vmcs12", &[Many("data.vmx[0].vmcs12", "uint8", 1, 0x1000)]),
                sub(
                    "cpu/kvm_nested_state/vmx/shadow_vmcs12",
                    &[Many("data.vmx[0].shadow_vmcs12", "uint8", 1, 0x1000)],
                ),
            ],
        },
        sub(
            "cpu/kvm_nested_state/svm",
            &[u64("hdr.svm.vmcb_pa"), Many("data.svm[0].vmcb12", "uint8", 1, 0x1000)],
        ),
    ],
};

/// The fields that every section has.
const FIELDS: &[Row] = &[
    u64s("env.regs", 16),
    u64("env.eip"),
    u64("env.eflags"),
    u32("env.hflags"),
    u16("env.fpuc"),
    u16("env.fpus_vmstate"),
    u16("env.fptag_vmstate"),
    u16("env.fpregs_format_vmstate"),
    Structs("env.fpregs", &FPREG, 8),
    Structs("env.segs", &SEGMENT, 6),
    Struct("env.ldt", &SEGMENT),
    Struct("env.tr", &SEGMENT),
    Struct("env.gdt", &SEGMENT),
    Struct("env.idt", &SEGMENT),
    u32("env.sysenter_cs"),
    u64("env.sysenter_esp"),
    u64("env.sysenter_eip"),
    u64("env.cr[0]"),
    u64("env.cr[2]"),
    u64("env.cr[3]"),
    u64("env.cr[4]"),
    u64s("env.dr", 8),
    i32("env.a20_mask"),
    u32("env.mxcsr"),
    Structs("env.xmm_regs[0]", &XMM, 16),
    u64("env.efer"),
    u64("env.star"),
    u64("env.lstar"),
    u64("env.cstar"),
    u64("env.fmask"),
    u64("env.kernelgsbase"),
    u32("env.smbase"),
    u64("env.pat"),
    u32("env.hflags2"),
    u64("env.vm_hsave"),
    u64("env.vm_vmcb"),
    u64("env.tsc_offset"),
    u64("env.intercept"),
    u16("env.intercept_cr_read"),
    u16("env.intercept_cr_write"),
    u16("env.intercept_dr_read"),
    u16("env.intercept_dr_write"),
    u32("env.intercept_exceptions"),
    u8("env.v_tpr"),
    u64s("env.mtrr_fixed", 11),
    u64("env.mtrr_deftype"),
    Structs("env.mtrr_var", &MTRR_VAR, 8),
    i32("env.interrupt_injected"),
    u32("env.mp_state"),
    u64("env.tsc"),
    i32("env.exception_nr"),
    u8("env.soft_interrupt"),
    u8("env.nmi_injected"),
    u8("env.nmi_pending"),
    u8("env.has_error_code"),
    u32("env.sipi_vector"),
    u64("env.mcg_cap"),
    u64("env.mcg_status"),
    u64("env.mcg_ctl"),
    u64s("env.mce_banks", 40),
    u64("env.tsc_aux"),
    u64("env.system_time_msr"),
    u64("env.wall_clock_msr"),
    u64("env.xcr0"),
    u64("env.xstate_bv"),
    Structs("env.xmm_regs[1]", &YMMH, 16),
];

/// What a device may have a reason to write, in the order in which it does.
const SUBSECTIONS: &[Schema] = &[
    sub(
        "cpu/exception_info",
        &[
            u8("env.exception_pending"),
            u8("env.exception_injected"),
            u8("env.exception_has_payload"),
            u64("env.exception_payload"),
        ],
    ),
    sub("cpu/async_pf_msr", &[u64("env.async_pf_en_msr")]),
    sub("cpu/async_pf_int_msr", &[u64("env.async_pf_int_msr")]),
    sub("cpu/async_pv_eoi_msr", &[u64("env.pv_eoi_en_msr")]),
    sub("cpu/steal_time_msr", &[u64("env.steal_time_msr")]),
    sub("cpu/poll_control_msr", &[u64("env.poll_control_msr")]),
    sub("cpu/fpop_ip_dp", &[u16("env.fpop"), u64("env.fpip"), u64("env.fpdp")]),
    sub("cpu/msr_tsc_adjust", &[u64("env.tsc_adjust")]),
    sub("cpu/msr_tscdeadline", &[u64("env.tsc_deadline")]),
    sub("cpu/msr_ia32_misc_enable", &[u64("env.msr_ia32_misc_enable")]),
    sub("cpu/msr_ia32_feature_control", &[u64("env.msr_ia32_feature_control")]),
    sub(
        "cpu/msr_architectural_pmu",
        &[
            u64("env.msr_fixed_ctr_ctrl"),
            u64("env.msr_global_ctrl"),
            u64("env.msr_global_status"),
            u64("env.msr_global_ovf_ctrl"),
            u64s("env.msr_fixed_counters", 3),
            u64s("env.msr_gp_counters", 18),
            u64s("env.msr_gp_evtsel", 18),
        ],
    ),
    sub(
        "cpu/mpx",
        &[
            Structs("env.bnd_regs", &BND, 4),
            u64("env.bndcs_regs.cfgu"),
            u64("env.bndcs_regs.sts"),
            u64("env.msr_bndcfgs"),
        ],
    ),
    sub("cpu/msr_hyperv_hypercall", &[u64("env.msr_hv_guest_os_id"), u64("env.msr_hv_hypercall")]),
    sub("cpu/msr_hyperv_vapic", &[u64("env.msr_hv_vapic")]),
    sub("cpu/msr_hyperv_time", &[u64("env.msr_hv_tsc")]),
    sub("cpu/msr_hyperv_crash", &[u64s("env.msr_hv_crash_params", 5)]),
    sub("cpu/msr_hyperv_runtime", &[u64("env.msr_hv_runtime")]),
    sub(
        "cpu/msr_hyperv_synic",
        &[
            u64("env.msr_hv_synic_control"),
            u64("env.msr_hv_synic_evt_page"),
            u64("env.msr_hv_synic_msg_page"),
            u64s("env.msr_hv_synic_sint", 16),
        ],
    ),
    sub("cpu/msr_hyperv_stimer", &[u64s("env.msr_hv_stimer_config", 4), u64s("env.msr_hv_stimer_count", 4)]),
    sub(
        "cpu/msr_hyperv_reenlightenment",
        &[
            u64("env.msr_hv_reenlightenment_control"),
            u64("env.msr_hv_tsc_emulation_control"),
            u64("env.msr_hv_tsc_emulation_status"),
        ],
    ),
    sub(
        "cpu/avx512",
        &[
            u64s("env.opmask_regs", 8),
            Structs("env.xmm_regs[0]", &ZMMH, 16),
            Structs("env.xmm_regs[1]", &HI16_ZMM, 16),
        ],
    ),
    sub("cpu/xss", &[u64("env.xss")]),
    sub("cpu/umwait", &[u32("env.umwait")]),
    sub("cpu/tsc_khz", &[One("env.tsc_khz", "int64", 8)]),
    sub("cpu/msr_smi_count", &[u64("env.msr_smi_count")]),
    sub("cpu/pkru", &[u32("env.pkru")]),
    sub("cpu/pkrs", &[u32("env.pkrs")]),
    sub("cpu/spec_ctrl", &[u64("env.spec_ctrl")]),
    sub("cpu/amd_tsc_scale_msr", &[u64("env.amd_tsc_scale_msr")]),
    sub("cpu/mcg_ext_ctl", &[u64("env.mcg_ext_ctl")]),
    sub(
        "cpu/intel_pt",
        &[
            u64("env.msr_rtit_ctrl"),
            u64("env.msr_rtit_status"),
            u64("env.msr_rtit_output_base"),
            u64("env.msr_rtit_output_mask"),
            u64("env.msr_rtit_cr3_match"),
            u64s("env.msr_rtit_addrs", 8),
        ],
    ),
    sub("cpu/virt_ssbd", &[u64("env.virt_ssbd")]),
    sub("cpu/svn_npt", &[u64("env.nested_cr3"), u32("env.nested_pg_mode")]),
    sub("cpu/svm_guest", &[u32("env.int_ctl")]),
    sub("cpu/nested_state", &[Struct("env.nested_state", &KVM_NESTED_STATE)]),
    sub(
        "cpu/xen_vcpu",
        &[
            u64("env.xen_vcpu_info_gpa"),
            u64("env.xen_vcpu_info_default_gpa"),
            u64("env.xen_vcpu_time_info_gpa"),
            u64("env.xen_vcpu_runstate_gpa"),
            u8("env.xen_vcpu_callback_vector"),
            Many("env.xen_virq", "uint16", 2, 24),
            u64("env.xen_singleshot_timer_ns"),
            u64("env.xen_periodic_timer_period"),
        ],
    ),
    sub("cpu/msr_tsx_ctrl", &[u32("env.tsx_ctrl")]),
    sub("cpu/intel_sgx", &[u64s("env.msr_ia32_sgxlepubkeyhash", 4)]),
    sub("cpu/pdptrs", &[u64s("env.pdptrs", 4)]),
    sub("cpu/msr_xfd", &[u64("env.msr_xfd"), u64("env.msr_xfd_err")]),
    sub("cpu/msr_hwcr", &[u64("env.msr_hwcr")]),
    sub(
        "cpu/fred",
        &[
            u64("env.fred_rsp0"),
            u64("env.fred_rsp1"),
            u64("env.fred_rsp2"),
            u64("env.fred_rsp3"),
            u64("env.fred_stklvls"),
            u64("env.fred_ssp1"),
            u64("env.fred_ssp2"),
            u64("env.fred_ssp3"),
            u64("env.fred_config"),
        ],
    ),
    sub(
        "cpu/intel_amx_xtile",
        &[Many("env.xtilecfg", "uint8", 1, 64), Many("env.xtiledata", "uint8", 1, 8192)],
    ),
    sub(
        "cpu/arch_lbr",
        &[u64("env.msr_lbr_ctl"), u64("env.msr_lbr_depth"), Structs("env.lbr_records", &LBR, 32)],
    ),
    sub("cpu/triple_fault", &[u8("env.triple_fault_pending")]),
];

/// The template of the section.
pub(super) fn device() -> Device {
    Device {
        name: CPU_SECTION.into(),
        vmsd_name: Some(CPU_SECTION.into()),
        version: Some(i64::from(CPU_VERSION)),
        fields: FIELDS.iter().map(Row::field).collect(),
        subsections: SUBSECTIONS.iter().map(Schema::description).collect(),
        ..Device::default()
    }
}

impl Schema {
    fn description(&self) -> Description {
        Description {
            vmsd_name: self.name.into(),
            version: self.version,
            fields: self.fields.iter().map(Row::field).collect(),
            subsections: self.subsections.iter().map(Schema::description).collect(),
        }
    }

    /// The length of its fields in bytes.
    fn fields_len(&self) -> u64 {
        self.fields.iter().map(Row::len).sum()
    }
}

impl Row {
    fn len(&self) -> u64 {
        match self {
            One(_, _, size) => *size,
            Many(_, _, size, count) => size * count,
            Struct(_, schema) | Tmp(schema) => schema.fields_len(),
            Structs(_, schema, count) => schema.fields_len() * count,
        }
    }

    fn field(&self) -> Field {
        let nested = |name: &str, schema: &Schema, array_len| Field {
            array_len,
            structure: Some(Box::new(schema.description())),
            ..Field::plain(name, "struct", schema.fields_len())
        };
        match self {
            One(name, kind, size) => Field::plain(name, kind, *size),
            Many(name, kind, size, count) => {
                Field { array_len: Some(*count), ..Field::plain(name, kind, *size) }
            }
            Struct(name, schema) => nested(name, schema, None),
            Structs(name, schema, count) => nested(name, schema, Some(*count)),
            Tmp(schema) => {
                Field { parts: vec![schema.description()], ..Field::plain("tmp", "tmp", schema.fields_len()) }
            }
        }
    }
}
