//! Small bare-metal programs.
