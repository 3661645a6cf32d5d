use elapid_cpu::*;
fn main() {
    let be = CpuBackend::new(&CpuOptions { threads: Some(2), isa: None, poison: true }).unwrap();
    let r = elapid_tensor::suite::check_all(&be);
    println!("{}", r.len());
    let mut v: Vec<_> = r.iter().collect();
    v.sort_by(|a, b| (b.error / b.tolerance).total_cmp(&(a.error / a.tolerance)));
    for x in v.iter().take(25) {
        println!("{x:?}");
    }
}
