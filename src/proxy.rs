//! (to come)
pub mod cover;
pub mod rules;
