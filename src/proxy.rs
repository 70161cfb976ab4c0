//! (to come)
pub mod cover;
pub mod iptables;
pub mod link;
pub mod rules;
