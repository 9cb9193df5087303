//! The device that KVM is reached through.

use std::ffi::CString;
use std::io;
use std::path::PathBuf;

use engine::EngineError;
use kvm_ioctls::{Cap, Kvm};

use crate::unsupported;

/// Names another device than `/dev/kvm`, as a container may have it.
const VARIABLE: &str = "NESTVMM_KVM";

/// The only version of KVM's API that there is (KVM API documentation §4.1).
const API_VERSION: i32 = 12;

/// KVM's device: `/dev/kvm`, or what the environment variable `NESTVMM_KVM` names.
pub fn path() -> PathBuf {
    std::env::var_os(VARIABLE).map_or_else(|| "/dev/kvm".into(), PathBuf::from)
}

/// Opens KVM's device and asks whether it has what this engine needs. It makes no virtual machine.
///
/// # Errors
/// [`EngineError`] names the call that failed and the host's answer, or what KVM lacks.
pub fn open() -> Result<Kvm, EngineError> {
    let failed = |source| {
        let call = match std::env::var_os(VARIABLE) {
            None => "opening /dev/kvm",
            Some(_) => "opening the device that NESTVMM_KVM names",
        };
        EngineError::Host { call, source }
    };
    let path = CString::new(path().into_os_string().into_encoded_bytes())
        .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let kvm = Kvm::new_with_path(&path).map_err(|e| failed(e.into()))?;
    let version = kvm.get_api_version();
    if version < 0 {
        return Err(EngineError::Host { call: "KVM_GET_API_VERSION", source: io::Error::last_os_error() });
    }
    if version != API_VERSION {
        return Err(unsupported(format!("/dev/kvm has API version {version}, not {API_VERSION}")));
    }
    let needed = [
        (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
        (Cap::ImmediateExit, "immediate_exit (KVM_CAP_IMMEDIATE_EXIT)"),
        (Cap::VcpuEvents, "vCPU events (KVM_CAP_VCPU_EVENTS)"),
        (Cap::X86UserSpaceMsr, "MSR exits (KVM_CAP_X86_USER_SPACE_MSR, Linux 5.10)"),
        (Cap::X86MsrFilter, "MSR filters (KVM_CAP_X86_MSR_FILTER, Linux 5.10)"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(unsupported(format!("/dev/kvm lacks {name}")));
        }
    }
    Ok(kvm)
}
