//! Drafts from the text itself: what followed when its last tokens came before.

use std::collections::HashMap;
use std::time::Duration;

use super::window::CLASSES;
use super::{Asked, Drafter, Worth};
use crate::client::Core;

/// Earlier places that are compared, the latest first.
const PLACES: usize = 32;
/// Longer matches say no more.
const LONGEST: usize = 16;
/// The token before a place where the text began.
const NOWHERE: u32 = u32::MAX;

/// Where each pair of tokens came in one sequence.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// The last place at which a pair ended.
    last: HashMap<(u32, u32), u32>,
    /// For each place the one before at which the same pair ended.
    before: Vec<u32>,
}

impl Index {
    /// Takes in what has been added to `tokens`, which begin as they did the last time.
    fn extend(&mut self, tokens: &[u32]) {
        for place in self.before.len()..tokens.len() {
            let previous = place.checked_sub(1).and_then(|before| {
                // A place that no `u32` can name is never looked up.
                self.last.insert((tokens[before], tokens[place]), u32::try_from(place).unwrap_or(NOWHERE))
            });
            self.before.push(previous.unwrap_or(NOWHERE));
        }
    }

    /// The place after the longest earlier match of the last tokens, the latest of equal ones, and the match's length.
    fn find(&self, tokens: &[u32]) -> Option<(usize, usize)> {
        let mut best = None;
        let mut place = *self.before.last()?;
        for _ in 0..PLACES {
            let Some(end) = usize::try_from(place).ok().filter(|&end| end + 1 < tokens.len()) else { break };
            let (earlier, now) = (tokens[..=end].iter().rev(), tokens.iter().rev());
            let length = earlier.zip(now).take(LONGEST).take_while(|(a, b)| a == b).count();
            if best.is_none_or(|(_, longest)| length > longest) {
                best = Some((end + 1, length));
            }
            if length == LONGEST {
                break;
            }
            place = self.before[end];
        }
        best
    }
}

/// How sure a continuation of a match is: the longer the match, the surer.
fn class(length: usize) -> u8 {
    let class = match length {
        0..=2 => 0,
        3 => 1,
        4 => 2,
        5..=6 => 3,
        7..=9 => 4,
        10..=13 => 5,
        14..=19 => 6,
        _ => CLASSES - 1,
    };
    class as u8
}

/// The longest match of the last tokens of prompt and answer, and what followed it. Costs next to nothing.
#[derive(Debug)]
pub(super) struct Lookup;

impl Drafter for Lookup {
    fn is_free(&self) -> bool {
        true
    }

    fn guesses(&self) -> [f64; CLASSES] {
        [0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.9, 0.95]
    }

    fn propose(&mut self, _: &Core, asked: &mut [Asked<'_>], _: &Worth<'_>) -> Duration {
        for asked in asked {
            asked.memory.index.extend(asked.tokens);
            let Some((mut place, length)) = asked.memory.index.find(asked.tokens) else { continue };
            for drafted in 0..asked.most {
                // What follows the match may be the draft itself: a text that goes round.
                let known = asked.tokens.get(place).or_else(|| asked.draft.tokens.get(place - asked.tokens.len()));
                let Some(&token) = known else { break };
                asked.draft.push(token, class(length + drafted));
                place += 1;
            }
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(tokens: &[u32]) -> Option<(usize, usize)> {
        let mut index = Index::default();
        // In pieces, as a sequence grows.
        (0..=tokens.len()).for_each(|end| index.extend(&tokens[..end]));
        index.find(tokens)
    }

    #[test]
    fn the_longest_match_wins_and_of_equal_ones_the_latest() {
        assert_eq!(find(&[]), None);
        assert_eq!(find(&[1]), None);
        assert_eq!(find(&[1, 2, 3, 4]), None);
        assert_eq!(find(&[1, 2, 3, 1, 2]), Some((2, 2)));
        assert_eq!(find(&[1, 2, 8, 1, 2, 9, 1, 2]), Some((5, 2)));
        assert_eq!(find(&[7, 1, 2, 8, 1, 2, 9, 7, 1, 2]), Some((3, 3)), "longer, though earlier");
        assert_eq!(find(&[5; 40]), Some((39, LONGEST)));
    }

    #[test]
    fn only_so_many_places_are_looked_at() {
        // The best match is the first of very many.
        let mut tokens = vec![9, 9, 1, 2, 77];
        (0..200).for_each(|i| tokens.extend([100 + i, 1, 2]));
        tokens.extend([9, 9, 1, 2]);
        let (place, length) = find(&tokens).unwrap();
        assert!(place > 400 && length == 2);
    }
}
