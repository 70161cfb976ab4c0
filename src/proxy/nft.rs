//! The backend that speaks to nf_tables itself: everything here turns values into netlink's bytes and back.

pub mod expr;
pub mod ruleset;
pub mod sum;
pub mod ways;
pub mod wire;
