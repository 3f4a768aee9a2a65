//! Live tests against two real instances.
