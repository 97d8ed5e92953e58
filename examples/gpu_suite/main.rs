mod bed;
mod ops;
fn main() {}
