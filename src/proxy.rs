//! (to come)
pub mod cover;
pub mod iptables;
pub mod rules;
