//! Our own descriptions of sections that images without a vmdescription have.
//!
//! They are templates: every subsection that there may be, for [`FieldDecoder::fit`](super::FieldDecoder::fit) to
//! choose from. That of `cpu` is the one of `qemu-system-x86_64`.

use crate::qemu::global_state::{GLOBAL_STATE_SECTION, PAYLOAD_LEN, RUN_STATE_AT, RUN_STATE_LEN};
use crate::qemu::vmdesc::{Device, Field};

use super::x86_cpu;

/// The QEMU that first recorded whether the guest was suspended when it was stopped.
const VM_WAS_SUSPENDED_SINCE: (u32, u32) = (9, 0);

/// The template for sections of that name and version, if there is one. `qemu` is the version, major and minor, of
/// the QEMU that wrote the section, as far as it is known.
pub fn template(name: &str, version: u32, qemu: Option<(u32, u32)>) -> Option<Device> {
    match (name, version) {
        (GLOBAL_STATE_SECTION, 1) => Some(global_state(qemu)),
        (x86_cpu::CPU_SECTION, x86_cpu::CPU_VERSION) => Some(x86_cpu::device()),
        _ => None,
    }
}

/// Source: `migration/global_state.c` `vmstate_globalstate`, 10.0; a vmdescription by 7.2.
fn global_state(qemu: Option<(u32, u32)>) -> Device {
    let mut fields = vec![Field::plain("size", "uint32", RUN_STATE_AT as u64)];
    if qemu.is_some_and(|version| version < VM_WAS_SUSPENDED_SINCE) {
        fields.push(Field::plain("runstate", "buffer", (PAYLOAD_LEN - RUN_STATE_AT) as u64));
    } else {
        let unused = PAYLOAD_LEN - RUN_STATE_AT - RUN_STATE_LEN - 2;
        fields.extend([
            Field::plain("runstate", "buffer", RUN_STATE_LEN as u64),
            Field::plain("has_vm_was_suspended", "uint8", 1),
            Field::plain("vm_was_suspended", "uint8", 1),
            Field::plain("unused", "buffer", unused as u64),
        ]);
    }
    Device {
        name: GLOBAL_STATE_SECTION.into(),
        vmsd_name: Some(GLOBAL_STATE_SECTION.into()),
        version: Some(1),
        fields,
        ..Device::default()
    }
}
