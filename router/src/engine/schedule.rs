//! How many rows of which sequence go into the next step. Pure.

/// Rows of prompts beside sequences that are decoding: so few that a token does not wait long for another one's prompt.
pub(super) const PREFILL_BESIDE: usize = 64;
/// Rows of prompts in a step in which nobody is decoding.
pub(super) use crate::generate::PREFILL_CHUNK as PREFILL_ALONE;

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
        assert_eq!(rows(&[100, 100, 100]), [100, 100, 56]);
        assert_eq!(rows(&[]), [0; 0]);
    }
}
