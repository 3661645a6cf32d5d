//! The suite that every backend passes: each op and each adjoint against the oracle.
