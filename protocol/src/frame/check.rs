//! The rules between the fields of a frame, the same for reading and for writing.

use super::limits::{MAX_CHUNK_BYTES, MAX_NETWORK_BYTES};
use super::{Chunk, ExpertAnswer, ExpertCall, ExpertRows, Frame, FrameError, FrameLimits, Malformed};
use crate::WireDtype;

impl Frame {
    /// Checks every rule of the protocol and every limit, with a body of `body_bytes`, which need not be there yet.
    pub(super) fn check(&self, body_bytes: usize, limits: &FrameLimits) -> Result<(), FrameError> {
        match self {
            Self::Hello(hello) => {
                FrameError::limit("bytes of network name", hello.network.len() as u64, MAX_NETWORK_BYTES as u32)
            }
            Self::Welcome(welcome) => {
                let dtypes = &welcome.dtypes;
                non_zero("dtypes", dtypes.len() as u32)?;
                non_zero("rows allowed", welcome.max_rows)?;
                if (1..dtypes.len()).any(|i| dtypes.iter().take(i).any(|earlier| Some(earlier) == dtypes.get(i))) {
                    return Err(Malformed::RepeatedDtype.into());
                }
                Ok(())
            }
            Self::Call(call) => check_call(call, body_bytes, limits),
            Self::Answer(answer) => check_answer(answer, body_bytes, limits),
            Self::Refusal(_) => Ok(()),
            Self::Fetch(fetch) => {
                non_zero("bytes wanted", fetch.length)?;
                FrameError::limit("bytes wanted", fetch.length.into(), MAX_CHUNK_BYTES)
            }
            Self::Chunk(chunk) => check_chunk(chunk, body_bytes),
        }
    }
}

impl Frame {
    /// Bytes that the bodies of a request and of the answer that it asks for take.
    pub(super) fn memory(&self, body_bytes: u32) -> u64 {
        let answer = match self {
            Self::Call(call) => bytes_of(call.answer_rows(), call.hidden_size, call.dtype),
            _ => 0,
        };
        answer.saturating_add(body_bytes.into())
    }
}

fn check_chunk(chunk: &Chunk, body_bytes: usize) -> Result<(), FrameError> {
    FrameError::limit("bytes of a chunk", body_bytes as u64, MAX_CHUNK_BYTES)?;
    non_zero("bytes in a chunk", body_bytes as u32)?;
    let left = chunk.total.saturating_sub(chunk.offset);
    if body_bytes as u64 > left {
        return Err(Malformed::BodyLength { found: body_bytes as u64, expected: left }.into());
    }
    Ok(())
}

fn check_call(call: &ExpertCall, body_bytes: usize, limits: &FrameLimits) -> Result<(), FrameError> {
    FrameError::limit("rows", call.rows.into(), limits.max_rows)?;
    FrameError::limit("experts", call.assignments.len() as u64, limits.max_experts)?;
    check_body(call.rows, call.hidden_size, call.dtype, body_bytes, limits)?;
    if call.assignments.is_empty() {
        return Err(Malformed::Empty("assignments").into());
    }
    let mut before = None;
    let mut assignments = 0u64;
    for assignment in &call.assignments {
        if before.is_some_and(|before| before >= assignment.expert) {
            return Err(Malformed::ExpertOrder(assignment.expert).into());
        }
        before = Some(assignment.expert);
        assignments += assignment.rows.len() as u64;
        FrameError::limit("assignments", assignments, limits.max_assignments)?;
        check_rows(assignment, call.rows)?;
    }
    // The answer obeys the same limit: better refused now than after computing.
    let answer_bytes = bytes_of(call.answer_rows(), call.hidden_size, call.dtype);
    FrameError::limit("bytes of the answer's body", answer_bytes, limits.max_body_bytes)
}

fn check_rows(assignment: &ExpertRows, rows: u32) -> Result<(), Malformed> {
    let expert = assignment.expert;
    if assignment.rows.is_empty() {
        return Err(Malformed::Empty("rows for an expert"));
    }
    if assignment.rows.len() != assignment.weights.len() {
        return Err(Malformed::WeightCount { expert, rows: assignment.rows.len(), weights: assignment.weights.len() });
    }
    let mut before = None;
    for &row in &assignment.rows {
        if row >= rows {
            return Err(Malformed::RowOutOfRange { expert, row, rows });
        }
        if before.is_some_and(|before| before >= row) {
            return Err(Malformed::RowOrder { expert, row });
        }
        before = Some(row);
    }
    if assignment.weights.iter().any(|weight| !weight.is_finite()) {
        return Err(Malformed::Weight(expert));
    }
    Ok(())
}

fn check_answer(answer: &ExpertAnswer, body_bytes: usize, limits: &FrameLimits) -> Result<(), FrameError> {
    FrameError::limit("rows", answer.rows.into(), limits.max_assignments.max(limits.max_rows))?;
    check_body(answer.rows, answer.hidden_size, answer.dtype, body_bytes, limits)
}

fn check_body(
    rows: u32,
    hidden_size: u32,
    dtype: WireDtype,
    found: usize,
    limits: &FrameLimits,
) -> Result<(), FrameError> {
    non_zero("rows", rows)?;
    non_zero("values in a row", hidden_size)?;
    FrameError::limit("values in a row", hidden_size.into(), limits.max_hidden_size)?;
    let expected = bytes_of(rows.into(), hidden_size, dtype);
    FrameError::limit("body bytes", expected, limits.max_body_bytes)?;
    if found as u64 != expected {
        return Err(Malformed::BodyLength { found: found as u64, expected }.into());
    }
    Ok(())
}

/// `rows` rows of `hidden_size` values; stays at `u64::MAX` where it would overflow, which no limit allows.
fn bytes_of(rows: u64, hidden_size: u32, dtype: WireDtype) -> u64 {
    rows.saturating_mul(dtype.row_bytes(hidden_size as usize) as u64)
}

fn non_zero(what: &'static str, count: u32) -> Result<(), Malformed> {
    if count == 0 { Err(Malformed::Empty(what)) } else { Ok(()) }
}
