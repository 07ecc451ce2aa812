//! How many rows of which sequence go into the next step. Pure.

/// Rows of prompts beside sequences that are decoding: so few that a token does not wait long for another one's prompt.
pub(super) const PREFILL_BESIDE: usize = 64;
/// Rows of prompts in a step in which nobody is decoding. Each step of a prompt costs the round trips of one, so it is large.
/// What does not fit into a frame is cut by the dispatcher.
pub(super) const PREFILL_ALONE: usize = 512;
/// The most rows of one sequence that wants the logits of all of them: they are a vocabulary wide.
pub(super) use crate::generate::PREFILL_CHUNK as PREFILL_TOLD;

/// Rows for each sequence, given how many each has pending, in the order of their arrival: one for each that is decoding, and for
/// prompts what a step has room for, first come, first served.
pub(super) fn rows(pending: &[usize]) -> Vec<usize> {
    let decoding = pending.contains(&1);
    let mut room = if decoding { PREFILL_BESIDE } else { PREFILL_ALONE };
    let share = |&pending: &usize| {
        if pending == 1 {
            return 1;
        }
        let rows = pending.min(room);
        room -= rows;
        rows
    };
    pending.iter().map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_decodes_gets_one_row_and_prompts_share_the_room_in_order() {
        assert_eq!(rows(&[1, 1, 1]), [1, 1, 1]);
        assert_eq!(rows(&[1, 50, 1, 500, 7]), [1, 50, 1, 14, 0]);
        assert_eq!(rows(&[1000, 3]), [PREFILL_ALONE, 0]);
        assert_eq!(rows(&[200, 200, 200]), [200, 200, 112]);
        assert_eq!(rows(&[510]), [510], "one pass, so one round trip for each layer");
        assert_eq!(rows(&[]), [0; 0]);
    }
}
