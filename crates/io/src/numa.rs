//! Where a lane runs on a machine whose memory is in nodes: on one of them, with its buffers.
//!
//! A lane that wanders to another node leaves its slab behind and reaches it through the interconnect from then on. So
//! each keeps to the processors of one node, in turn, and its buffers are touched there first. The guest's memory may be
//! anywhere: pieces go to whichever lane is free.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where Linux tells of its nodes (Documentation/admin-guide/mm/numaperf.rst).
const NODES: &str = "/sys/devices/system/node";

/// More nodes than any machine has.
const NODES_MAX: usize = 1024;

/// The processors of each node that this process may use; fewer than two nodes are none.
#[derive(Debug, Default)]
struct Nodes(Vec<CpuSet>);

/// Keeps this thread, that of the lane `number`, to one node. Where the machine has but one, or does not let us, it stays
/// where the kernel puts it.
pub(crate) fn settle(number: usize) {
    static OF_MACHINE: OnceLock<Nodes> = OnceLock::new();
    let nodes = OF_MACHINE.get_or_init(|| {
        let allowed = sched_getaffinity(None).unwrap_or_default();
        Nodes::read(Path::new(NODES), &allowed)
    });
    if let Some(processors) = nodes.of_lane(number) {
        // It is a matter of speed alone.
        let _ = sched_setaffinity(None, processors);
    }
}

impl Nodes {
    fn read(directory: &Path, allowed: &CpuSet) -> Nodes {
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let nodes: Vec<CpuSet> = numbers(&text(&directory.join("online")), NODES_MAX)
            .map(|node| {
                let listed = text(&directory.join(format!("node{node}/cpulist")));
                let mut processors = CpuSet::new();
                numbers(&listed, CpuSet::MAX_CPU)
                    .filter(|processor| allowed.is_set(*processor))
                    .for_each(|processor| processors.set(processor));
                processors
            })
            // Nodes of nothing but memory have no processors.
            .filter(|processors| processors.count() > 0)
            .collect();
        if nodes.len() < 2 { Nodes::default() } else { Nodes(nodes) }
    }

    fn of_lane(&self, number: usize) -> Option<&CpuSet> {
        self.0.get(number.checked_rem(self.0.len())?)
    }
}

/// The numbers below `limit` of a list as the kernel writes it: `0-3,8`. What is no number is left out.
fn numbers(list: &str, limit: usize) -> impl Iterator<Item = usize> {
    list.trim().split(',').flat_map(move |range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) => first..last.saturating_add(1).min(limit),
            _ => 0..0,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(processors: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        processors.iter().for_each(|processor| set.set(*processor));
        set
    }

    fn machine(online: &str, nodes: &[(usize, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("online"), online).unwrap();
        for (number, list) in nodes {
            let node = directory.path().join(format!("node{number}"));
            fs::create_dir(&node).unwrap();
            fs::write(node.join("cpulist"), list).unwrap();
        }
        directory
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        for (list, expected) in [
            ("0-3,8\n", &[0, 1, 2, 3, 8][..]),
            ("5", &[5]),
            ("", &[]),
            ("\n", &[]),
            ("x,2-,1-2", &[1, 2]),
            ("0-18446744073709551615", &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ] {
            assert_eq!(numbers(list, 10).collect::<Vec<_>>(), expected, "{list}");
        }
    }

    #[test]
    fn lanes_take_turns_on_the_nodes_that_have_processors_for_them() {
        // The second has memory alone, and of the third this process may use one processor.
        let directory = machine("0-2,4\n", &[(0, "0-1,4\n"), (1, "\n"), (2, "2-3\n"), (4, "6-7\n")]);
        let nodes = Nodes::read(directory.path(), &set(&[0, 1, 3, 4]));
        let found: Vec<_> = (0..4).map(|lane| nodes.of_lane(lane)).collect();
        let (first, third) = (set(&[0, 1, 4]), set(&[3]));
        assert_eq!(found, [Some(&first), Some(&third), Some(&first), Some(&third)]);
    }

    #[test]
    fn on_a_machine_of_one_node_lanes_run_where_they_like() {
        let directory = machine("0\n", &[(0, "0-7\n")]);
        assert!(Nodes::read(directory.path(), &set(&[0, 1])).of_lane(0).is_none());
        assert!(Nodes::read(Path::new("/nonexistent"), &set(&[0])).of_lane(0).is_none());
    }
}
