//! Plain f64 definitions of every op and its adjoint.
