//! Memory: addresses, loads and stores.

use super::{Body, Scalar, Ty, Val, list, scalar, vector};

impl Body<'_> {
    /// `ptr` moved by `offset` bytes.
    pub fn at(&mut self, ptr: Val, offset: Val) -> Val {
        self.op(
            scalar(Scalar::Ptr),
            format_args!("llvm.getelementptr {ptr}[{offset}] : (!llvm.ptr, i64) -> !llvm.ptr, i8"),
        )
    }

    /// `ptr` moved by a constant number of bytes.
    pub fn at_const(&mut self, ptr: Val, offset: usize) -> Val {
        match offset {
            0 => ptr,
            n => self.op(
                scalar(Scalar::Ptr),
                format_args!("llvm.getelementptr {ptr}[{n}] : (!llvm.ptr) -> !llvm.ptr, i8"),
            ),
        }
    }

    /// `ptr` moved by `index` elements of `elem`.
    pub fn element(&mut self, ptr: Val, index: Val, elem: Scalar) -> Val {
        self.op(
            scalar(Scalar::Ptr),
            format_args!(
                "llvm.getelementptr {ptr}[{index}] : (!llvm.ptr, i64) -> !llvm.ptr, {}",
                scalar(elem)
            ),
        )
    }

    /// Room on the stack for `n` words of 8 bytes, from the start of a cache line on, as long as the function runs.
    pub fn room(&mut self, n: usize) -> Val {
        let n = self.size(n);
        self.op(
            scalar(Scalar::Ptr),
            format_args!("llvm.alloca {n} x i64 {{alignment = 64 : i64}} : (i64) -> !llvm.ptr"),
        )
    }

    /// Reads; nothing is assumed about alignment beyond that of an element.
    pub fn load(&mut self, ptr: Val, ty: Ty) -> Val {
        let align = ty.elem.bytes();
        self.op(ty, format_args!("llvm.load {ptr} {{alignment = {align} : i64}} : !llvm.ptr -> {ty}"))
    }

    /// Writes.
    pub fn store(&mut self, v: Val, ptr: Val) {
        let align = v.ty.elem.bytes();
        self.line(format_args!("llvm.store {v}, {ptr} {{alignment = {align} : i64}} : {}, !llvm.ptr", v.ty));
    }

    /// Writes a scalar that other threads may write too.
    pub fn store_shared(&mut self, v: Val, ptr: Val) {
        let align = v.ty.bytes();
        self.line(format_args!(
            "llvm.store {v}, {ptr} atomic monotonic {{alignment = {align} : i64}} : {}, !llvm.ptr",
            v.ty
        ));
    }

    /// Reads a scalar that other threads may write.
    pub fn load_shared(&mut self, ptr: Val, elem: Scalar) -> Val {
        let (ty, align) = (scalar(elem), elem.bytes());
        self.op(
            ty,
            format_args!(
                "llvm.load {ptr} atomic monotonic {{alignment = {align} : i64}} : !llvm.ptr -> {ty}"
            ),
        )
    }

    /// A scalar read from bytes of any alignment.
    pub fn load_bytes_as(&mut self, ptr: Val, elem: Scalar) -> Val {
        let ty = scalar(elem);
        self.op(ty, format_args!("llvm.load {ptr} {{alignment = 1 : i64}} : !llvm.ptr -> {ty}"))
    }

    /// The lanes before `there`, as a constant.
    pub(super) fn first_lanes(&mut self, lanes: usize, there: usize) -> Val {
        let mask: Vec<bool> = (0..lanes).map(|i| i < there).collect();
        let ty = vector(lanes, Scalar::I1);
        self.op(ty, format_args!("arith.constant dense<[{}]> : {ty}", list(mask)))
    }

    /// Reads the first `there` lanes; the others are 0, and their memory is not touched.
    pub fn load_some(&mut self, ptr: Val, ty: Ty, there: usize) -> Val {
        match there {
            0 => self.splat(ty, 0.0),
            n if n == ty.lanes => self.load(ptr, ty),
            n => {
                let (mask, zero) = (self.first_lanes(ty.lanes, n), self.splat(ty, 0.0));
                let (mask_ty, align) = (mask.ty, ty.elem.bytes());
                self.op(
                    ty,
                    format_args!("llvm.intr.masked.load {ptr}, {mask}, {zero} {{alignment = {align} : i32}} : (!llvm.ptr, {mask_ty}, {ty}) -> {ty}"),
                )
            }
        }
    }

    /// Writes the first `there` lanes.
    pub fn store_some(&mut self, v: Val, ptr: Val, there: usize) {
        match there {
            0 => {}
            n if n == v.ty.lanes => self.store(v, ptr),
            n => {
                let mask = self.first_lanes(v.ty.lanes, n);
                let (ty, mask_ty, align) = (v.ty, mask.ty, v.ty.elem.bytes());
                self.line(format_args!("llvm.intr.masked.store {v}, {ptr}, {mask} {{alignment = {align} : i32}} : {ty}, {mask_ty} into !llvm.ptr"));
            }
        }
    }

    /// Asks for the cache line at `ptr` + `ahead` bytes, to be read once.
    pub fn prefetch(&mut self, ptr: Val, ahead: usize) {
        let p = self.at_const(ptr, ahead);
        self.line(format_args!("\"llvm.intr.prefetch\"({p}) <{{cache = 1 : i32, hint = 3 : i32, rw = 0 : i32}}> : (!llvm.ptr) -> ()"));
    }
}
