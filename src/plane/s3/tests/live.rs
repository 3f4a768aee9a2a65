//! The plane against the real servers of a lab.
