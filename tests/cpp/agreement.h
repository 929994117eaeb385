// A kernel and its gradients against a reference: on every instruction set, in several dtypes, and on
// three threads the same bits as on one.
#pragma once

#include <initializer_list>
#include <vector>

#include "catch.h"
#include "levels.h"
#include "strided.h"

namespace longspan::test {

/// CHECKs that two runs gave the same bits.
inline void check_same_bits(const Named& a, const Named& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    INFO(a[i].first);
    CHECK(a[i].second.memory.bytes() == b[i].second.memory.bytes());
  }
}

/// For each of `cases` (with a `name`): reference(case, Inputs(case, dtype)), a vector of values a
/// result, against compute(kernels, case, inputs, threads), a Named in the same order. units(case,
/// result) of rounding are allowed in wide dtypes, at the size of the greatest number; 2 in 16-bit ones.
template <class Inputs, class Cases, class Reference, class Compute, class Units>
void check_agreement(const Cases& cases, std::initializer_list<Dtype> dtypes, const Reference& reference,
                     const Compute& compute, const Units& units) {
  for (const auto& c : cases) {
    for (const Dtype dtype : dtypes) {
      const Inputs in(c, dtype);
      const std::vector<std::vector<double>> expected = reference(c, in);
      for (const Level& level : levels()) {
        INFO(level.name << ", " << name_of(dtype) << ", " << c.name);
        const Named one = compute(*level.kernels, c, in, 1);
        for (size_t i = 0; i < one.size(); ++i) {
          const Strided& got = one[i].second;
          INFO(one[i].first);
          CHECK(distance(got.values(), expected[i]) <= allowed(got.memory.dtype(), units(c, i), 2));
        }
        check_same_bits(one, compute(*level.kernels, c, in, 3));
      }
    }
  }
}

}  // namespace longspan::test
