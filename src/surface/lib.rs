//! The doors of the house: gRPC for operators, plain HTTP for probes, the command line.
//!
//! A surface parses, calls and shows. None decides, none holds state, none names a plane
//! or the quorum; messages of the wire stop here and in `dc_wire::convert`.
//!
//! Invariants: HTTP only reads; every order carries the name in the caller's certificate;
//! what is shown of outside text cannot steer a terminal; unknown is never shown as well.

pub mod cli;
pub mod grpc;
pub mod http;
mod spec_file;
