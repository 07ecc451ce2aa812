//! The tree of pieces: what is asked below what, and which answers count.

use std::ops::{Index, IndexMut};

use futures::future::AbortHandle;
use hanse_protocol::{ExpertRows, PeerId, Precision};

pub(super) const ROOT: usize = 0;

/// What came back for some work.
pub(super) struct Answer {
    /// Rows of the layer, ascending.
    pub(super) rows: Vec<u32>,
    pub(super) values: Vec<f32>,
    /// How the peer that computed it stores experts, where that matters.
    pub(super) precision: Option<Precision>,
}

pub(super) struct Piece {
    parent: usize,
    pub(super) children: Vec<usize>,
    open_children: usize,
    pub(super) assignments: Vec<ExpertRows>,
    /// Peers that were asked for this work, this piece's own included.
    pub(super) tried: Vec<PeerId>,
    pub(super) resolved: bool,
    pub(super) failed: bool,
    pub(super) answer: Option<Answer>,
    abort: Option<AbortHandle>,
}

impl Piece {
    fn of(assignments: Vec<ExpertRows>) -> Self {
        Self {
            parent: ROOT,
            children: Vec::new(),
            open_children: 0,
            assignments,
            tried: Vec::new(),
            resolved: false,
            failed: false,
            answer: None,
            abort: None,
        }
    }
}

/// Pieces by number; each was added after the one above it.
#[derive(Default)]
pub(super) struct Tree(Vec<Piece>);

impl Index<usize> for Tree {
    type Output = Piece;

    fn index(&self, piece: usize) -> &Piece {
        &self.0[piece]
    }
}

impl IndexMut<usize> for Tree {
    fn index_mut(&mut self, piece: usize) -> &mut Piece {
        &mut self.0[piece]
    }
}

impl Tree {
    /// Begins it with all of the work.
    pub(super) fn plant(&mut self, assignments: Vec<ExpertRows>) {
        self.0.push(Piece::of(assignments));
    }

    /// The number of the piece that is added next.
    pub(super) fn next(&self) -> usize {
        self.0.len()
    }

    /// Adds a piece below `parent`.
    pub(super) fn add(
        &mut self,
        parent: usize,
        assignments: Vec<ExpertRows>,
        tried: Vec<PeerId>,
        abort: Option<AbortHandle>,
    ) -> usize {
        let piece = self.next();
        self.0.push(Piece { parent, tried, abort, ..Piece::of(assignments) });
        self[parent].children.push(piece);
        self[parent].open_children += 1;
        piece
    }

    /// Whether the piece's own call is still wanted and in flight.
    pub(super) fn is_waiting(&self, piece: usize) -> bool {
        !self[piece].resolved && !self[piece].failed
    }

    /// A piece's work is done, and with it perhaps that of those above it.
    pub(super) fn resolve(&mut self, piece: usize) {
        self.drop_calls(piece);
        self[piece].resolved = true;
        if piece == ROOT {
            return;
        }
        let parent = self[piece].parent;
        self[parent].open_children -= 1;
        if self[parent].open_children == 0 && !self[parent].resolved {
            self.resolve(parent);
        }
    }

    /// Drops the calls of a piece and of everything below it.
    fn drop_calls(&mut self, piece: usize) {
        if let Some(abort) = self[piece].abort.take() {
            abort.abort();
        }
        for child in self[piece].children.clone() {
            if !self[child].resolved {
                self[child].resolved = true;
                self.drop_calls(child);
            }
        }
    }

    /// The answers that count, with their work, in the order of the plan; none where nothing was planted.
    pub(super) fn answers(&self) -> Vec<(&[ExpertRows], &Answer)> {
        let mut found = Vec::new();
        if !self.0.is_empty() {
            self.collect(ROOT, &mut found);
        }
        found
    }

    fn collect<'a>(&'a self, piece: usize, into: &mut Vec<(&'a [ExpertRows], &'a Answer)>) {
        match &self[piece].answer {
            Some(answer) => into.push((&self[piece].assignments, answer)),
            None => self[piece].children.iter().for_each(|&child| self.collect(child, into)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(experts: &[u32]) -> Vec<ExpertRows> {
        experts.iter().map(|&expert| ExpertRows { expert, rows: vec![0], weights: vec![1.0] }).collect()
    }

    /// A tree of two calls, the first of which was also asked of two others.
    fn tree() -> (Tree, [usize; 4]) {
        let mut tree = Tree::default();
        tree.plant(work(&[0, 1, 2]));
        let first = tree.add(ROOT, work(&[0, 1]), Vec::new(), Some(AbortHandle::new_pair().0));
        let second = tree.add(ROOT, work(&[2]), Vec::new(), Some(AbortHandle::new_pair().0));
        let below = [0, 1].map(|expert| tree.add(first, work(&[expert]), Vec::new(), None));
        (tree, [first, second, below[0], below[1]])
    }

    fn answer(tree: &mut Tree, piece: usize) {
        tree[piece].answer = Some(Answer { rows: vec![0], values: vec![piece as f32], precision: None });
        tree.resolve(piece);
    }

    fn values(tree: &Tree) -> Vec<usize> {
        tree.answers().iter().map(|(_, answer)| answer.values[0] as usize).collect()
    }

    #[test]
    fn a_piece_is_done_by_its_own_answer_or_by_those_of_all_below_it() {
        let (mut tree, [first, second, left, right]) = tree();
        answer(&mut tree, second);
        answer(&mut tree, left);
        assert!(tree.is_waiting(first) && tree.is_waiting(ROOT));
        answer(&mut tree, right);
        assert!(!tree.is_waiting(first) && !tree.is_waiting(ROOT));
        assert_eq!(values(&tree), [left, right, second], "in the order of the plan");
    }

    #[test]
    fn an_answer_makes_up_for_those_below_it_also_where_some_have_come() {
        let (mut tree, [first, second, left, right]) = tree();
        answer(&mut tree, left);
        answer(&mut tree, first);
        assert!(!tree.is_waiting(right), "its call is not needed any more");
        assert!(tree.is_waiting(ROOT));
        answer(&mut tree, second);
        assert_eq!(values(&tree), [first, second], "no expert counts twice");
    }

    #[test]
    fn a_call_that_is_not_needed_any_more_is_dropped() {
        let (mut tree, [first, ..]) = tree();
        let (abort, _registration) = AbortHandle::new_pair();
        let late = tree.add(first, work(&[0, 1]), Vec::new(), Some(abort.clone()));
        answer(&mut tree, first);
        assert!(abort.is_aborted() && !tree.is_waiting(late));
        assert!(Tree::default().answers().is_empty());
    }
}
