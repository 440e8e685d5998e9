// distilcb.losses.logit_rows for a CPU: each row of logits read twice and its gradient written once.
//
// Plain C++ without torch's headers, which take half a minute to compile. distilcb/losses/logit_cpu.py calls it.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <omp.h>

#include "../numbers.hpp"

namespace {

struct Terms {
    float kl, mlm, mse, inverse_temperature;
};

// Columns whose sums are taken in fp32; those of all blocks are added up in fp64.
constexpr int64_t BLOCK = 2048;

// exps[i] = e^((row[i] - top) factor), and their sum.
template <class Number>
APART double exponentials(const Number* row, int64_t vocab, float top, float factor, float* exps) {
    double total = 0;
    for (int64_t first = 0; first < vocab; first += BLOCK) {
        const int64_t last = first + BLOCK < vocab ? first + BLOCK : vocab;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < last; ++i) {
            const float each = exponential((float(row[i]) - top) * factor);
            exps[i] = each;
            sum += each;
        }
        total += sum;
    }
    return total;
}

// Sums of weights times the distance of teacher and student, each below its top, and of the square of their difference.
template <class Number>
APART void differences(const Number* student, float top, const Number* teacher, float teacher_top, const float* weights,
                       int64_t vocab, double* crossed, double* squares) {
    *crossed = *squares = 0;
    for (int64_t first = 0; first < vocab; first += BLOCK) {
        const int64_t last = first + BLOCK < vocab ? first + BLOCK : vocab;
        float cross = 0, square = 0;
#pragma omp simd reduction(+ : cross, square)
        for (int64_t i = first; i < last; ++i) {
            const float theirs = teacher[i], ours = student[i], distance = theirs - ours;
            cross += weights[i] * ((theirs - teacher_top) - (ours - top));
            square += distance * distance;
        }
        *crossed += cross;
        *squares += square;
    }
}

// The gradient with respect to a logit, made of factors. ratio: of the sums of exponentials, ours to theirs, so that
// the gradient of a student that is its teacher is exactly 0, in fused multiplications too.
struct Gradient {
    float ours, ratio, distance, plain;

    template <bool SOFT, bool MSE, bool HARD>
    float of(float student, float teacher, float our_exp, float their_exp, float plain_exp) const {
        float sum = 0;
        if (SOFT) sum += (our_exp - their_exp * ratio) * ours;
        if (MSE) sum += (student - teacher) * distance;
        if (HARD) sum += plain_exp * plain;
        return sum;
    }
};

// What is written is added to its column's sum.
template <bool SOFT, bool MSE, bool HARD, class Number>
APART void write(Number* student, const Number* teacher, const float* ours, const float* theirs, const float* plain,
                 int64_t vocab, Gradient gradient, float* columns) {
#pragma omp simd
    for (int64_t i = 0; i < vocab; ++i) {
        student[i].set(gradient.of<SOFT, MSE, HARD>(student[i], MSE ? float(teacher[i]) : 0.0f, SOFT ? ours[i] : 0.0f,
                                                    SOFT ? theirs[i] : 0.0f, HARD ? plain[i] : 0.0f));
        columns[i] += student[i];
    }
}

// One row. space: four times its length, of which the last holds the columns' sums. teacher: nullptr where there is
// none; label: -1 likewise. sums: kl, mlm, mse. student becomes the gradient.
template <class Number>
void take_row(Number* student, const Number* teacher, int64_t label, int64_t vocab, Terms terms, bool wants_gradient,
              float* space, float* sums) {
    float *ours = space, *theirs = space + vocab, *plain = space + 2 * vocab;
    const float inverse = terms.inverse_temperature, top = largest(student, vocab);
    Gradient gradient{0, 0, 2 * terms.mse, 0};
    sums[0] = sums[1] = sums[2] = 0;
    if (teacher) {
        const float teacher_top = largest(teacher, vocab);
        const double exps = exponentials(student, vocab, top, inverse, ours);
        const double teacher_exps = exponentials(teacher, vocab, teacher_top, inverse, theirs);
        double crossed, squares;
        differences(student, top, teacher, teacher_top, theirs, vocab, &crossed, &squares);
        // Sum of p (log p - log q): the distance of the logits less that of the log-sum-exps.
        const double kl = crossed / teacher_exps * inverse + std::log(exps / teacher_exps);
        if (terms.kl) sums[0] = float(kl / (double(inverse) * inverse));
        if (terms.mse) sums[2] = float(squares);
        gradient.ours = float(terms.kl / inverse / exps);
        gradient.ratio = float(exps / teacher_exps);
    }
    if (label >= 0) {
        const double exps = exponentials(student, vocab, top, 1.0f, plain);
        sums[1] = float(std::log(exps) + top - float(student[label]));
        gradient.plain = float(terms.mlm / exps);
        plain[label] -= float(exps);  // times the factor: its probability less one
    }
    if (!wants_gradient) return;
    const bool mse = teacher && terms.mse != 0;
    auto writer = write<false, false, false, Number>;
    if (label >= 0)
        writer = mse       ? write<true, true, true, Number>
                 : teacher ? write<true, false, true, Number>
                           : write<false, false, true, Number>;
    else if (teacher)
        writer = mse ? write<true, true, false, Number> : write<true, false, false, Number>;
    writer(student, teacher, ours, theirs, plain, vocab, gradient, space + 3 * vocab);
}

// Strides in numbers. space: (threads, 4, vocab), the fourth zeros, to which each thread adds the gradients of its rows.
// by_row: (rows, 3) sums. The teacher has the first soft_rows rows, labels the first hard_rows. Returns how many labels
// are none of the vocabulary; if any, nothing is done.
template <class Number>
int64_t take_rows(Number* student, int64_t stride, const Number* teacher, int64_t teacher_stride,
                  const int64_t* labels, int64_t rows, int64_t soft_rows, int64_t hard_rows, int64_t vocab,
                  Terms terms, bool wants_gradient, int threads, float* space, float* by_row) {
    const int64_t wrong = std::count_if(labels, labels + hard_rows, [=](int64_t l) { return l < 0 || l >= vocab; });
    if (wrong) return wrong;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        take_row(student + row * stride, row < soft_rows ? teacher + row * teacher_stride : nullptr,
                 row < hard_rows ? labels[row] : -1, vocab, terms, wants_gradient,
                 space + omp_get_thread_num() * 4 * vocab, by_row + 3 * row);
    return 0;
}

}  // namespace

#define TAKE_ROWS(NAME, NUMBER)                                                                                     \
    extern "C" int64_t NAME(void* student, int64_t stride, const void* teacher, int64_t teacher_stride,             \
                            const int64_t* labels, int64_t rows, int64_t soft_rows, int64_t hard_rows,              \
                            int64_t vocab, float kl, float mlm, float mse, float inverse_temperature,               \
                            int wants_gradient, int threads, float* space, float* by_row) {                         \
        return take_rows(static_cast<NUMBER*>(student), stride, static_cast<const NUMBER*>(teacher), teacher_stride, \
                         labels, rows, soft_rows, hard_rows, vocab, Terms{kl, mlm, mse, inverse_temperature},       \
                         wants_gradient != 0, threads, space, by_row);                                              \
    }

TAKE_ROWS(distilcb_take_rows_bf16, BFloat16)
TAKE_ROWS(distilcb_take_rows_fp32, Float32)
