//! Rows that tasks multiply by columns of a matrix, or of several.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::halves::{FROM_ROWS, Panels, Plain, TILE_ROWS};
use crate::lanes::{Isa, Lanes};
use crate::share::Pending;

/// `[rows, inputs]`, for kernels of one instruction set.
pub(crate) struct Inputs {
    pub(super) isa: Isa,
    /// Values as they lie.
    pub(super) first: *const f32,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    order: Option<Order>,
}

// SAFETY: values are only read, and those in order only written before others can have them.
unsafe impl Send for Inputs {}
// SAFETY: as above.
unsafe impl Sync for Inputs {}

/// The values in the order in which tiles read them, for which whoever first needs them cares, together with those who need them meanwhile.
struct Order {
    panels: Panels<TILE_ROWS>,
    /// The next tile that nobody cares for.
    next: AtomicUsize,
    pending: Pending,
}

impl Inputs {
    /// `rows` rows of `inputs` values that lie behind each other. They are read when they are first multiplied, and must be there and stay as they
    /// are from then on.
    pub(crate) fn new(isa: Isa, first: *const f32, rows: usize, inputs: usize) -> Self {
        let order = (!isa.is_wide() && rows >= FROM_ROWS).then(|| Order {
            panels: Panels::new(rows, inputs),
            next: AtomicUsize::new(0),
            pending: Pending::new(rows.div_ceil(TILE_ROWS)),
        });
        Self { isa, first, rows, inputs, order }
    }

    /// The values in order, if there are so many rows that the kernels of this instruction set want them so.
    ///
    /// # Safety
    /// The values are there; `L` is for the instruction set.
    #[inline(always)]
    pub(super) unsafe fn in_order<L: Lanes>(&self) -> Option<&Panels<TILE_ROWS>> {
        let order = self.order.as_ref()?;
        let tiles = self.rows.div_ceil(TILE_ROWS);
        while order.next.load(Ordering::Relaxed) < tiles {
            let tile = order.next.fetch_add(1, Ordering::Relaxed);
            if tile < tiles {
                let _done = order.pending.task();
                let plain = Plain { first: self.first, inputs: self.inputs };
                let row = tile * TILE_ROWS;
                let rows = TILE_ROWS.min(self.rows - row);
                // SAFETY: nobody else has this tile, and nobody reads it before it is done.
                unsafe { order.panels.fill::<L, _>(row, (plain, row), rows, self.inputs) };
            }
        }
        order.pending.wait();
        Some(&order.panels)
    }
}
