//! The volunteer, and the one binary with all commands.
