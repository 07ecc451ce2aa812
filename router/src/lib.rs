//! The client: who hosts what, which replica, dispatch and combine, the decoding engine.
