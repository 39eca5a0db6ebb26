//! Elementary functions, by polynomials.
