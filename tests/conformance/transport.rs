//! Rules of `Transport` and `Link`, run over every sibling.
//!
//! To add a sibling: implement [`fixture::Fixture`] for a marker type in `fixture.rs` (how to start a node, what it
//! publishes), add it to [`processes::child_entry`] if it reaches another process, and add a line to the list at the
//! end of this file. Every rule is a generic function in `rules.rs` (one process) or `processes.rs` (a child process is killed or
//! stopped).

mod fixture;
mod processes;
mod rules;
mod same_host;

/// One module of tests per sibling. `in_process` rules hold for all; `two_processes_open` adds those with a child process,
/// `two_processes` those of access control.
macro_rules! conformance {
    ($($module:ident: $fixture:ident, $rules:ident;)*) => {$(
        mod $module {
            conformance!(@$rules $fixture);
        }
    )*};
    (@in_process $fixture:ident) => {
        conformance!(@list rules $fixture
            every_byte_arrives_and_no_other_changes
            many_slices_over_many_regions_all_arrive
            out_of_bounds_fails_its_slice_and_harms_no_other
            threads_may_share_a_link
            cancel_leaves_nothing_open
            close_settles_every_slice
            unregistered_memory_is_left_alone
        );
    };
    (@two_processes $fixture:ident) => {
        conformance!(@two_processes_open $fixture);
        conformance!(@list rules $fixture stranger_is_refused_with_the_reason);
    };
    (@two_processes_open $fixture:ident) => {
        conformance!(@in_process $fixture);
        conformance!(@list processes $fixture
            other_process_is_reached
            killed_target_fails_slices_soon
            killed_initiator_frees_the_region
            stopped_initiator_resumes_without_harm
        );
    };
    (@list $from:ident $fixture:ident $($rule:ident)*) => {
        $(
            #[test]
            fn $rule() {
                use super::fixture::{self, Fixture};
                if fixture::$fixture::is_possible() {
                    super::$from::$rule::<fixture::$fixture>();
                }
            }
        )*
    };
}

conformance! {
    local: Local, in_process;
    fake: Fake, in_process;
    shm: Shm, two_processes;
    shm_mixed: ShmMixed, two_processes;
    cma: Cma, two_processes;
    tcp: Tcp, two_processes;
    mooncake_tcp: Mooncake, two_processes_open;
}

#[test]
fn fake_script_decides_how_slices_end() {
    rules::script_decides_how_slices_end();
}
