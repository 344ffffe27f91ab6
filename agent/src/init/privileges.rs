//! Ids, capabilities and `no_new_privs`, in the one order that works.

use rustix::{
    io::Errno,
    thread::{
        CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
        configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
        set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};

use super::{Doing, Result};
use crate::spec::plan::{Capabilities, ProcessPlan};

/// Gives up everything that the plan does not grant.
pub(super) fn apply(plan: &ProcessPlan) -> Result<()> {
    let sets = plan.capabilities;
    drop_bounding(sets)?;
    // Else the change of the user id would clear what is to be granted.
    set_keep_capabilities(true).doing("keep capabilities")?;
    set_ids(plan.uid, plan.gid, &plan.groups)
        .doing(format!("become user {} in group {}", plan.uid, plan.gid))?;
    set_keep_capabilities(false).doing("stop keeping capabilities")?;
    set_sets(sets)?;
    if plan.no_new_privileges {
        set_no_new_privs(true).doing("set no_new_privs")?;
    }
    Ok(())
}

/// The agent and its helper have one thread each, so that the thread's ids are
/// the process's.
pub(super) fn set_ids(uid: u32, gid: u32, groups: &[u32]) -> Result<(), Errno> {
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// Every capability that the kernel knows, in turn.
fn known() -> impl Iterator<Item = CapabilitySet> {
    CapabilitySet::all().iter()
}

fn drop_bounding(sets: Capabilities) -> Result<()> {
    let keep = CapabilitySet::from_bits_retain(sets.bounding);
    for capability in known().filter(|capability| !keep.contains(*capability)) {
        match remove_capability_from_bounding_set(capability) {
            // A kernel without this capability cannot grant it either.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => {
                return Err(errno).doing(format!("drop {capability:?} from the bounding set"));
            }
        }
    }
    Ok(())
}

fn set_sets(sets: Capabilities) -> Result<()> {
    let to_set = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(sets.effective),
        permitted: CapabilitySet::from_bits_retain(sets.permitted),
        inheritable: CapabilitySet::from_bits_retain(sets.inheritable),
    };
    set_capabilities(None, to_set).doing("set the capabilities")?;
    clear_ambient_capability_set().doing("clear the ambient capabilities")?;
    let ambient = CapabilitySet::from_bits_retain(sets.ambient);
    for capability in known().filter(|capability| ambient.contains(*capability)) {
        configure_capability_in_ambient_set(capability, true)
            .doing(format!("make {capability:?} ambient"))?;
    }
    Ok(())
}
